"""What differences in accuracy mean: tests, intervals, effect sizes and what a test set of this size cannot show.

A claim is about new examples, and about the training of new models, not about the seeds that happened to be run. With R runs
and n test examples, D (R, n) holds run by run and example by example whether the first was right less whether the second was
(1, 0 or -1). Its mean is the drop. It varies with the examples (rows of the data set), with the runs, and with the rest; where
examples come in groups (fine-tunes of one set of images), whole groups are the sample. Probabilities and accuracies are fractions.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from settings import Cell, group_of

LEVEL = 0.05               # of a test; intervals hold 1 - LEVEL
FEW = 10                   # units that differ, below which a t test of equality is not trusted
POWER = 0.8                # of the smallest drop that could be shown
FLIPS = 9999               # random signs of the sign-flip test
RESAMPLES = 4000           # of a bootstrap
MANY = 500                 # examples or groups from which a bootstrap takes their mean as normal
SEED = 0


@dataclass(frozen=True)
class Spread:
    """The standard error of a grand mean over runs and examples, its degrees of freedom, and how many examples or groups it is from."""

    error: float
    freedom: float
    units: int
    constant: bool = False     # over all runs and examples

    @property
    def half_width(self) -> float:
        """Of the 95 % interval; where nothing varies at least Clopper and Pearson's bound for what was not among the units: 1 - 0.025^(1 / units)."""
        if self.error == math.inf:
            return math.inf
        half = float(scipy.stats.t.ppf(1 - LEVEL / 2, self.freedom)) * self.error
        return max(half, 1 - (LEVEL / 2) ** (1 / self.units)) if self.constant else half


def spread_of_mean(D: np.ndarray, groups: np.ndarray | None = None) -> Spread:
    """Of the mean of D (R, n) when both the runs and the examples are samples, independent of each other.

    Two-way random effects without replication: the variances of the mean over examples and over runs, less that of the rest,
    with Satterthwaite's degrees of freedom; what Dorfman, Berbaum and Metz (1992) and Obuchowski and Rockette (1995) do for
    readers and cases. Groups (n,) take the examples' place: their deviations are those from the mean of the others (jackknife),
    and they count as n^2 over the sum of their squared sizes. To the squares of the examples is added one that differs, as
    Agresti and Min (2005) do, because a few that differ by chance are no measure of how many could. Of one run, the
    examples' part alone: nothing is known of other runs.
    """
    R, n = D.shape
    of_example, of_run, mean = D.mean(0), D.mean(1), D.mean()
    names, index = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    G, sizes = len(names), np.bincount(index)
    if G < 2:
        return Spread(math.inf, 1.0, G)
    deviations = np.bincount(index, of_example - mean, minlength=G) / (1 - sizes / n)
    examples = float((deviations**2).sum() + (n / G) ** 2) * (G - 1) / G / n**2
    examples_df, constant = max(n**2 / float((sizes**2).sum()) - 1, 1.0), bool(np.ptp(D) == 0)
    if R == 1:
        return Spread(math.sqrt(examples), examples_df, G, constant)
    runs, runs_df = float(of_run.var(ddof=1)) / R, R - 1
    rest_df = (n - 1) * (R - 1)
    rest = float(((D - of_example - of_run[:, None] + mean) ** 2).sum()) / rest_df / (n * R)
    total = max(examples + runs - rest, examples, runs)
    freedom = total**2 / (examples**2 / examples_df + runs**2 / runs_df + rest**2 / rest_df)
    return Spread(math.sqrt(total), min(freedom, 1.0) if R == 2 else freedom, G, constant)


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


@functools.lru_cache(maxsize=1)
def drawn_again(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each unit is drawn in each of the resamples, (B, G)."""
    return np.random.default_rng([seed, units]).multinomial(units, np.full(units, 1 / units), resamples)


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
        of_groups = drawn_again(G, resamples, seed)                                      # (B, G)
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
    +-`margin`; where fewer than FEW examples or groups differ at all, at least the chance of so few if `margin` of them did.
    `smallest` is the difference that would be found significant with a probability of POWER.
    """
    D = first.astype(np.float64) - second
    drop, spread, d = float(D.mean()), spread_of_mean(D, groups), D.mean(0)
    flip, t_test = p_values_of_mean(D, spread, groups)
    equivalence = 1.0                                                    # where there is one unit only, nothing is shown
    if spread.error < math.inf:
        equivalence = float(max(scipy.stats.t.sf((margin - drop) / spread.error, spread.freedom),
                                scipy.stats.t.sf((margin + drop) / spread.error, spread.freedom)))
        differ = int((np.abs(D).max(0) > 0).sum()) if groups is None else len(np.unique(groups[np.abs(D).max(0) > 0]))
        if differ < FEW:                                                 # as many of `margin` of the units, or fewer, by chance
            equivalence = max(equivalence, float(scipy.stats.binom.cdf(differ, spread.units, margin)))
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
    if spread.error == math.inf:
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


COMPARISONS = (("all_layers", "visual_only"), ("all_layers", "text_only"), ("visual_only", "text_only"),
               ("all_layers", "random_half"), ("random_half", "visual_only"))


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
        "accuracies": {cell.name: accuracy(of_cell, of_test, chance_level(labels)) for cell, of_cell in right.items()},
        "comparisons": [], "runs": max(len(of_cell) for of_cell in right.values()),
    }
    units = found["groups"] if groups is not None else len(rows)
    representations = list(dict.fromkeys(cell.representation for cell in cells))
    for representation in representations:
        halves = [of_cell for cell, of_cell in right.items() if cell.representation == representation and group_of(cell.layer_set) == "random_half"]
        if halves and all(half.shape == halves[0].shape for half in halves):
            right[Cell(representation, "random_half")] = np.mean(halves, axis=0)          # of the draws, run by run and example by example
    for first, second in COMPARISONS:
        entries = []
        for representation in representations:
            a, b = (right.get(Cell(representation, layer_set)) for layer_set in (first, second))
            if a is not None and b is not None and a.shape == b.shape:
                entries.append({"representation": representation, **difference(a, b, margin, of_test)})
        adjust(entries)
        if 2 / 2**min(units, 64) * len(entries) >= LEVEL:                # no flipping of so few signs is rare enough
            for entry in entries:
                entry["smallest"] = None
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


def accuracy(right: np.ndarray, groups: np.ndarray | None, chance: float) -> dict:
    """Mean accuracy of runs (R, n) with its 95 % interval for new examples and runs, and two errors that are often confused.

    The interval is not shorter than Wilson's of the mean accuracy. `p_above_chance` is that of a one-sided t test.

    `binomial_error` is that of the mean accuracy on n independent examples, `seeds_std` the std over the runs; where the
    latter is smaller, an interval over seeds is narrower than what the test set allows.
    """
    spread, mean = spread_of_mean(right.astype(np.float64), groups), float(right.mean())
    low, high = mean - spread.half_width, mean + spread.half_width
    if groups is None:                                                   # near 0 and 1 a t interval of few errors is too short
        wilson = scipy.stats.binomtest(round(mean * right.shape[1]), right.shape[1]).proportion_ci(1 - LEVEL, method="wilson")
        low, high = min(low, wilson.low), max(high, wilson.high)
    error, seeds = binomial_error(mean, right.shape[1]), float(right.mean(1).std())
    above = float(scipy.stats.t.sf((mean - chance) / spread.error, spread.freedom)) if spread.error < math.inf else 1.0
    return {"accuracy": mean, "interval": (max(0.0, low), min(1.0, high)), "binomial_error": error, "p_above_chance": above,
            "seeds_std": seeds if len(right) > 1 else None, "seeds_narrower_than_test_set": len(right) > 1 and seeds < error}


FEWEST_RUNS = 3            # from which how runs differ is known well enough for a claim about new ones


def verdict(found: dict, split: str = "random") -> str:
    """One paragraph of what `infer` found about the drop without the text layers, with its conditions and no more than it shows.

    `split` is how the rows were divided; {} of `found` means that train, validation and test are the same rows.
    """
    if not found:
        return "No verdict: there is no finished cell, or train, validation and test are the same rows."
    main = next((one["entries"] for one in found["comparisons"] if (one["first"], one["second"]) == COMPARISONS[0]), [])
    if not main:
        return "No verdict: no representation was run with all layers and with the visual layers alone."
    if found["runs"] < FEWEST_RUNS:
        return f"No verdict: {found['runs']} runs a cell do not tell how runs differ; --num-runs {FEWEST_RUNS} or more would."
    cells = [found["accuracies"][f"all_layers_{entry['representation']}"] for entry in main]
    able = [entry for entry, p in zip(main, holm([cell["p_above_chance"] for cell in cells]), strict=True) if p < LEVEL]
    unable = [entry["representation"] for entry in main if entry not in able]
    lost = [entry for entry in able if entry["p_holm"] < LEVEL and entry["drop"] > 0]
    gained = [entry for entry in able if entry["p_holm"] < LEVEL and entry["drop"] < 0]
    same = [entry for entry in able if entry["p_equivalence_holm"] < LEVEL and entry not in lost + gained]
    open_ = [entry for entry in able if entry not in lost + gained + same]
    sample = f"{found['test_rows']} test rows" if found["groups"] is None else f"{found['groups']} groups of test rows"
    points = lambda entry: (f"{entry['representation']} ({100 * entry['drop']:+.1f} points, 95 % interval "  # noqa: E731
                            f"{100 * entry['interval'][0]:+.1f} to {100 * entry['interval'][1]:+.1f})")
    parts = []
    if not able:
        parts.append(f"With all layers no representation is shown to be above chance ({100 * found['chance']:.1f} %): there is nothing here that a "
                     "drop could be taken from.")
    elif unable:
        parts.append(f"With all layers {', '.join(unable)} {'is' if len(unable) == 1 else 'are'} not shown to be above chance "
                     f"({100 * found['chance']:.1f} %), so nothing can be said of a drop.")
    if lost:
        parts.append(f"Without the text layers accuracy falls for {len(lost)} of {len(main)} representation{'s' * (len(main) > 1)} "
                     f"(p < {LEVEL:g} after Holm's correction): " + ", ".join(map(points, lost)) + ".")
    if gained:
        parts.append(f"It rises for {len(gained)}: " + ", ".join(map(points, gained)) + ".")
    if same:
        parts.append(f"For {', '.join(entry['representation'] for entry in same)} the two are equal to within {100 * found['margin']:g} points.")
    if open_:
        smallest = [100 * entry["smallest"] for entry in open_ if entry["smallest"] is not None]
        span = f"{min(smallest, default=0):.1f}" + (f" to {max(smallest):.1f}" if smallest and max(smallest) - min(smallest) >= 0.1 else "")
        parts.append(f"For {', '.join(entry['representation'] for entry in open_)} this run cannot tell: with {sample} "
                     + (f"a drop is found with {100 * POWER:.0f} % probability only from {span} points on (before the correction)." if smallest
                        else f"no drop of any size could pass a test of {len(main)} at once."))
    halves = next((one["entries"] for one in found["comparisons"] if (one["first"], one["second"]) == COMPARISONS[4]), [])
    if halves:
        worse = [entry for entry in halves if entry["p_holm"] < LEVEL and entry["drop"] > 0]
        better = [entry for entry in halves if entry["p_holm"] < LEVEL and entry["drop"] < 0]
        parts.append("Against random halves of the modules, which lose as many, accuracy with the visual layers is "
                     + (f"lower for {', '.join(map(points, worse))}" if worse else "not shown to be lower for any representation")
                     + (f", and higher for {', '.join(entry['representation'] for entry in better)}" if better else "") + ".")
    parts.append(f"These are statements about new examples and new runs of this data set's kind, on one {split} split"
                 + ("." if halves else "; fewer columns are left without the text layers, so a fall alone does not say that the text layers know "
                    "something which the visual ones do not (--layer-sets random_half would tell the two apart)."))
    shared = found["test_rows_that_share_a_group_with_training"]
    if shared:
        parts.append(f"{shared} of {found['test_rows']} test rows share their group with a training row: for new groups accuracies may be lower and "
                     "drops others.")
    return " ".join(parts)
