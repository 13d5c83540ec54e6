"""What differences in accuracy mean: tests, intervals, effect sizes and what a test set of this size cannot show.

A claim is about new examples, and about the training of new models, not about the seeds that happened to be run. With R runs
and n test examples, D (R, n) holds run by run and example by example whether the first was right less whether the second was
(1, 0 or -1). Its mean is the drop. It varies with the examples (rows of the data set), with the runs, and with the rest; where
examples come in groups (fine-tunes of one set of images), whole groups are the sample. Probabilities and accuracies are fractions.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from settings import Cell

LEVEL = 0.05               # of a test; intervals hold 1 - LEVEL
POWER = 0.8                # of the smallest drop that could be shown
FLIPS = 9999               # random signs of the sign-flip test
RESAMPLES = 4000           # of a bootstrap
MANY = 2000                # examples or groups from which a bootstrap takes their mean as normal
SEED = 0


@dataclass(frozen=True)
class Spread:
    """The standard error of a grand mean over runs and examples, its degrees of freedom, and how many examples or groups it is from."""

    error: float
    freedom: float
    units: int

    @property
    def half_width(self) -> float:
        """Of the 95 % interval. Where nothing varies, Clopper and Pearson's bound for what was not among the units: 1 - 0.025^(1 / units)."""
        if self.error == 0:
            return 1 - (LEVEL / 2) ** (1 / self.units)
        return float(scipy.stats.t.ppf(1 - LEVEL / 2, self.freedom)) * self.error if self.error < math.inf else math.inf


def spread_of_mean(D: np.ndarray, groups: np.ndarray | None = None) -> Spread:
    """Of the mean of D (R, n) when both the runs and the examples are samples, independent of each other.

    Two-way random effects without replication: the mean squares of examples and runs less that of the rest, over n R, with
    Satterthwaite's degrees of freedom; what Dorfman, Berbaum and Metz (1992) and Obuchowski and Rockette (1995) do for readers
    and cases. Groups (n,) take the examples' place by the sum of their deviations. Of one run, the examples' part alone.
    """
    R, n = D.shape
    of_example, of_run, mean = D.mean(0), D.mean(1), D.mean()
    names, index = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    G = len(names)
    if G < 2:
        return Spread(math.inf, 1.0, G)
    sums = np.bincount(index, of_example - mean, minlength=G)
    examples, examples_df = float((sums**2).sum()) * G / (G - 1) / n**2, G - 1          # variances of the mean
    if R == 1:
        return Spread(math.sqrt(examples), examples_df, G)
    runs, runs_df = float(of_run.var(ddof=1)) / R, R - 1
    rest = float(((D - of_example - of_run[:, None] + mean) ** 2).sum()) / ((n - 1) * (R - 1)) / (n * R) if n > 1 else 0.0
    total = max(examples + runs - rest, examples, runs)
    denominator = examples**2 / examples_df + runs**2 / runs_df + rest**2 / ((n - 1) * (R - 1))
    return Spread(math.sqrt(total), total**2 / denominator if denominator > 0 else examples_df, G)


def sign_flip_test(d: np.ndarray, groups: np.ndarray | None = None, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p-value of a mean of `d` (n,) that far from 0 if each example's difference, or each group's, were as likely of the other sign.

    By `flips` random choices of all signs, the observed one counted among them (Phipson and Smyth 2010); by all of them where
    there are fewer. Examples without a difference have no sign. 1 if none has one. Equal differences are flipped together: how
    many of them get a plus is binomial.
    """
    if groups is not None:
        d = np.bincount(np.unique(groups, return_inverse=True)[1], d)
    d = d[np.abs(d) > 1e-12]
    if not len(d):
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-9)
    if 2 ** len(d) <= flips:
        signs = 1 - 2 * ((np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1)
        return float((np.abs(signs @ d) >= observed).mean())
    sizes, counts = np.unique(np.abs(d).round(12), return_counts=True)
    plus = np.random.default_rng(seed).binomial(counts, 0.5, (flips, len(counts)))
    return (1 + int((np.abs((2 * plus - counts) @ sizes) >= observed).sum())) / (flips + 1)


def two_level_bootstrap(D: np.ndarray, groups: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = SEED) -> tuple[float, float]:
    """The 95 % interval of the mean of D (R, n): runs and examples, or whole groups of them, are drawn again independently of each other.

    The pigeonhole bootstrap of crossed samples (Owen 2007), percentiles; deviations grow by sqrt(R / (R - 1)), which drawing
    from R runs takes away. From MANY examples or groups on, the mean over those drawn again is taken from the normal
    distribution of its mean and variance, which are known.
    """
    R, n = D.shape
    rng = np.random.default_rng(seed)
    names, index = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    G = len(names)
    sums = np.stack([np.bincount(index, row, minlength=G) for row in D])                 # (R, G)
    sizes = np.bincount(index, minlength=G)
    of_runs = rng.multinomial(R, np.full(R, 1 / R), resamples) / R                       # (B, R)
    if G > MANY:
        rest = sums - D.mean(1)[:, None] * sizes                                         # a group's part of a run's deviation
        variance = np.einsum("br,rs,bs->b", of_runs, rest @ rest.T / n**2, of_runs, optimize=True)
        means = of_runs @ D.mean(1) + np.sqrt(variance.clip(0)) * rng.normal(size=resamples)
    else:
        of_groups = rng.multinomial(G, np.full(G, 1 / G), resamples)                     # (B, G)
        means = ((of_runs @ sums) * of_groups).sum(1) / (of_groups @ sizes)
    widen = math.sqrt(R / (R - 1)) if R > 1 else 1.0
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    mean = D.mean()
    return float(mean + widen * (low - mean)), float(mean + widen * (high - mean))


def training_noise(drops: np.ndarray, seed: int = SEED) -> tuple[float, float] | None:
    """The 95 % BCa interval of the mean of one drop a run, by scipy: over seeds on the same rows, so about nothing but training. None for one run."""
    if len(drops) < 2:
        return None
    if np.ptp(drops) == 0:
        return float(drops[0]), float(drops[0])
    found = scipy.stats.bootstrap((drops,), np.mean, confidence_level=1 - LEVEL, method="BCa", random_state=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def difference(first: np.ndarray, second: np.ndarray, margin: float, groups: np.ndarray | None = None) -> dict:
    """What is to be said about accuracy `first` less accuracy `second`; both (R, n), whether each run was right on each test example.

    `p` is the larger of the sign-flip test's, which takes the runs as they are, and that of a t test with the standard error of
    runs and examples together; the 95 % interval is the wider of that error's and the two-level bootstrap's at each end. So a
    conclusion must hold for new examples and for new runs. `p_equivalence` is the larger of two one-sided t tests against
    +-`margin`. `smallest` is the difference that would be found significant with a probability of POWER.
    """
    D = first.astype(np.float64) - second
    drop, spread, d = float(D.mean()), spread_of_mean(D, groups), D.mean(0)
    flip, t_test = p_values_of_mean(D, spread, groups)
    if 0 < spread.error < math.inf:
        equivalence = float(max(scipy.stats.t.sf((margin - drop) / spread.error, spread.freedom),
                                scipy.stats.t.sf((margin + drop) / spread.error, spread.freedom)))
    else:                                                                # no example differs, or there is one only: nothing is shown
        equivalence = 1.0
    bootstrap = two_level_bootstrap(D, groups)
    half = spread.half_width
    interval = max(-1.0, min(bootstrap[0], drop - half)), min(1.0, max(bootstrap[1], drop + half))
    a, b, scatter = float(first.mean()), float(second.mean()), float(d.std(ddof=1)) if len(d) > 1 else 0.0
    power = float(scipy.stats.t.ppf(POWER, spread.freedom)) * spread.error if spread.error < math.inf else 1.0
    return {
        "drop": drop, "interval": interval, "p": max(flip, t_test), "p_sign_flip": flip, "p_examples_and_runs": t_test,
        "standard_error": spread.error if math.isfinite(spread.error) else None, "bootstrap_interval": bootstrap, "p_equivalence": equivalence,
        "margin": margin, "training_noise_interval": training_noise(D.mean(1)),
        "cohens_h": 2 * (math.asin(math.sqrt(a)) - math.asin(math.sqrt(b))), "d_z": drop / scatter if scatter > 0 else None,
        "smallest": min(1.0, half + power),
    }


def p_values_of_mean(D: np.ndarray, spread: Spread, groups: np.ndarray | None) -> tuple[float, float]:
    """Of the mean of D (R, n): the sign-flip test's, and that of the t test with the error of examples and runs. 1 where nothing can be shown."""
    if not 0 < spread.error < math.inf:
        return sign_flip_test(D.mean(0), groups), 1.0
    return sign_flip_test(D.mean(0), groups), float(2 * scipy.stats.t.sf(abs(D.mean()) / spread.error, spread.freedom))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted for testing all of them (Holm 1979): rejecting those below LEVEL errs anywhere with probability LEVEL at most."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, i in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(running, 1.0)
    return adjusted.tolist()


def chance_level(labels: np.ndarray) -> float:
    """Accuracy of always answering the most frequent class of the test rows."""
    return float(np.bincount(labels).max() / len(labels))


def binomial_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy on n independent examples."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


# --- a whole run


COMPARISONS = (("all_layers", "visual_only"), ("all_layers", "text_only"), ("visual_only", "text_only"))


def infer(predictions: dict[Cell, dict[str, np.ndarray]], groups: np.ndarray | None, margin: float) -> dict:
    """What the saved predictions of a run's cells say. `groups` (N,) are the groups of the data set's rows, if it has any.

    `accuracies` of each cell with its interval for new examples and runs; `comparisons` of two layer sets, representation by
    representation, `p_holm` adjusted over these; `ranking` of every two representations with all layers, adjusted over the
    pairs; the chance level, and how many test rows share their group with a training row.
    """
    cells = {cell: arrays for cell, arrays in predictions.items() if not cell.audit}
    if not cells:
        return {}
    arrays = next(iter(cells.values()))
    labels, rows = arrays["test_labels"], arrays["test_rows"]
    of_test = groups[rows] if groups is not None else None
    right = {cell: found["test_predictions"] == found["test_labels"] for cell, found in cells.items()}
    found = {
        "test_rows": len(rows), "margin": margin, "chance": chance_level(labels), "level": LEVEL, "power": POWER,
        "groups": None if groups is None else int(len(np.unique(of_test))),
        "test_rows_that_share_a_group_with_training": None if groups is None else int(np.isin(of_test, groups[arrays["train_rows"]]).sum()),
        "accuracies": {cell.name: accuracy(of_cell, of_test) for cell, of_cell in right.items()},
        "comparisons": [],
    }
    representations = list(dict.fromkeys(cell.representation for cell in cells))
    for first, second in COMPARISONS:
        entries = []
        for representation in representations:
            a, b = (right.get(Cell(representation, layer_set)) for layer_set in (first, second))
            if a is not None and b is not None and a.shape == b.shape:
                entries.append({"representation": representation, **difference(a, b, margin, of_test)})
        adjust(entries)
        if entries:
            found["comparisons"].append({"first": first, "second": second, "entries": entries})
    with_all = {name: right[Cell(name, "all_layers")] for name in representations if Cell(name, "all_layers") in right}
    found["ranking"] = []
    for first, second in itertools.combinations(sorted(with_all, key=lambda name: -with_all[name].mean()), 2):
        D = with_all[first].astype(np.float64) - with_all[second]        # kernel_ridge's one run beside each of the other's
        found["ranking"].append({"better": first, "worse": second, "difference": float(D.mean()),
                                 "p": max(p_values_of_mean(D, spread_of_mean(D, of_test), of_test))})
    adjust(found["ranking"])
    return found


def adjust(entries: list[dict]) -> None:
    """Add to each what Holm makes of its p-values among those of all."""
    for key in ("p", "p_equivalence"):
        if entries and key in entries[0]:
            for entry, adjusted in zip(entries, holm([entry[key] for entry in entries]), strict=True):
                entry[f"{key}_holm"] = adjusted


def accuracy(right: np.ndarray, groups: np.ndarray | None) -> dict:
    """Mean accuracy of runs (R, n) with its 95 % interval for new examples and runs, and two errors that are often confused.

    `binomial_error` is that of the mean accuracy on n independent examples, `seeds_std` the std over the runs; where the
    latter is smaller, an interval over seeds is narrower than what the test set allows.
    """
    spread, mean = spread_of_mean(right.astype(np.float64), groups), float(right.mean())
    half = spread.half_width
    error, seeds = binomial_error(mean, right.shape[1]), float(right.mean(1).std())
    return {"accuracy": mean, "interval": (max(0.0, mean - half), min(1.0, mean + half)), "binomial_error": error, "seeds_std": seeds,
            "seeds_narrower_than_test_set": seeds < error}


def verdict(found: dict, splits_overlap: bool = False) -> str:
    """One paragraph of what `infer` found about the drop without the text layers, with its conditions and no more than it shows."""
    main = [one for one in found.get("comparisons", []) if (one["first"], one["second"]) == COMPARISONS[0]]
    if splits_overlap:
        return "No verdict: train, validation and test are the same rows."
    if not main:
        return "No verdict: no representation was run with all layers and with the visual layers alone."
    entries, n, margin = main[0]["entries"], found["test_rows"], 100 * found["margin"]
    points = lambda entry: (f"{entry['representation']} ({100 * entry['drop']:+.1f} points, 95 % interval "  # noqa: E731
                            f"{100 * entry['interval'][0]:+.1f} to {100 * entry['interval'][1]:+.1f})")
    lost = [entry for entry in entries if entry["p_holm"] < LEVEL and entry["drop"] > 0]
    gained = [entry for entry in entries if entry["p_holm"] < LEVEL and entry["drop"] < 0]
    same = [entry for entry in entries if entry["p_equivalence_holm"] < LEVEL and entry not in lost + gained]
    open_ = [entry for entry in entries if entry not in lost + gained + same]
    able = [entry for entry in entries if found["accuracies"][f"all_layers_{entry['representation']}"]["interval"][0] > found["chance"]]
    parts = []
    if not able:
        parts.append(f"With all layers no representation is above chance ({100 * found['chance']:.1f} %) by more than its 95 % interval: there is "
                     "nothing here that a drop could be taken from.")
    unit = "representation" if len(entries) == 1 else "representations"
    if lost:
        parts.append(f"Without the text layers accuracy falls for {len(lost)} of {len(entries)} {unit} (p < {LEVEL:g} after Holm's correction): "
                     + ", ".join(map(points, lost)) + ".")
    if gained:
        parts.append(f"It rises for {len(gained)}: " + ", ".join(map(points, gained)) + ".")
    if same:
        parts.append(f"For {', '.join(entry['representation'] for entry in same)} the two are equal to within {margin:g} points.")
    if open_:
        smallest = [100 * entry["smallest"] for entry in open_]
        span = f"{min(smallest):.1f}" + (f" to {max(smallest):.1f}" if max(smallest) - min(smallest) >= 0.1 else "")
        parts.append(f"For {', '.join(entry['representation'] for entry in open_)} this run cannot tell: with {n} test rows a drop is found with "
                     f"{100 * POWER:.0f} % probability only from {span} points on (before the correction).")
    parts.append("These are statements about new examples and new runs of this data set's kind, on one random split; half of the columns go with the "
                 "text layers, so a fall alone does not say that the text layers know something which the visual ones do not.")
    shared = found["test_rows_that_share_a_group_with_training"]
    if shared:
        parts.append(f"{shared} of {n} test rows share their group with a training row: for new groups accuracies may be lower.")
    return " ".join(parts)
