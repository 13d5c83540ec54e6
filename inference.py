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
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats

from settings import CLASSIFIERS, LAYER_SET_GROUPS, Cell, group_of

LEVEL = 0.05               # of a test; intervals hold 1 - LEVEL
FEW = 10                   # units that differ, below which a t test of equality is not trusted
POWER = 0.8                # of the smallest drop that could be shown
FLIPS = 9999               # random signs of the sign-flip test
RESAMPLES = 4000           # of a bootstrap
MANY = 500                 # examples or groups from which a bootstrap takes their mean as normal
SHUFFLES = 1999            # permutations of the test labels in the check of shuffled ones
SUSPECT = 0.01             # of runs without a fault are called suspect by it
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


def spread_over_splits(D: list[np.ndarray], rows: list[np.ndarray], ratio: float, groups: np.ndarray | None = None) -> Spread:
    """Of the mean over K splits of the means of D[k] (R, n), on the test rows rows[k] (n,); `ratio` is that of test to training rows.

    The variance over splits times 1/K + ratio, with K - 1 degrees of freedom: splits of one data set share most of their rows,
    so that their mean varies more than 1/K of it (Nadeau and Bengio 2003). One of U examples or groups that differs is
    added, as in `spread_of_mean`. Where rows of the data set come in `groups` (N,), random splits do not show how groups
    differ, and the spread of the first split's is taken if it is wider.
    """
    means = np.array([d.mean() for d in D])
    everywhere = np.unique(np.concatenate(rows))
    units = len(everywhere) if groups is None else len(np.unique(groups[everywhere]))
    error = math.sqrt(float(means.var(ddof=1)) * (1 / len(means) + ratio) + 1 / units**2)
    found = Spread(error, len(means) - 1, units, bool(all(np.ptp(d) == 0 for d in D) and np.ptp(means) == 0))
    of_first = None if groups is None else spread_of_mean(D[0], groups[rows[0]])
    return found if of_first is None or of_first.half_width < found.half_width else of_first


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
    spread = spread_of_mean(D, groups)
    flip, t_test = p_values_of_mean(D, spread, groups)
    differ = int((np.abs(D).max(0) > 0).sum()) if groups is None else len(np.unique(groups[np.abs(D).max(0) > 0]))
    bootstrap = two_level_bootstrap(D, groups)
    found = conclusion([first], [second], spread, differ, margin)
    low, high = found["interval"]
    return found | {"interval": (max(-1.0, min(bootstrap[0], low)), min(1.0, max(bootstrap[1], high))), "p": max(flip, t_test), "p_sign_flip": flip,
                    "p_examples_and_runs": t_test, "bootstrap_interval": bootstrap}


def difference_over_splits(first: list[np.ndarray], second: list[np.ndarray], margin: float, rows: list[np.ndarray], ratio: float,
                           groups: np.ndarray | None = None) -> dict:
    """The same from K splits: (R, n) of each, on the test rows `rows`. `ratio` and `groups` are those of `spread_over_splits`.

    `p` and the interval are the corrected t test's, `drop` is the mean of `drops`, one a split.
    """
    D = [a.astype(np.float64) - b for a, b in zip(first, second, strict=True)]
    spread = spread_over_splits(D, rows, ratio, groups)
    moved = np.unique(np.concatenate([of_split[np.abs(d).max(0) > 0] for d, of_split in zip(D, rows, strict=True)]))
    differ = len(moved) if groups is None else len(np.unique(groups[moved]))
    found = conclusion(first, second, spread, differ, margin)
    return found | {"p": p_of_mean(found["drop"], spread), "drops": [float(d.mean()) for d in D]}


def conclusion(first: list[np.ndarray], second: list[np.ndarray], spread: Spread, differ: int, margin: float) -> dict:
    """What follows from the spread of a drop, whatever it was taken from. `differ` examples or groups differ at all."""
    D = [a.astype(np.float64) - b for a, b in zip(first, second, strict=True)]
    a, b, drop = (float(np.mean([part.mean() for part in parts])) for parts in (first, second, D))
    equivalence = 1.0                                                    # where there is one unit only, nothing is shown
    if spread.error < math.inf:
        equivalence = float(max(scipy.stats.t.sf((margin - drop) / spread.error, spread.freedom),
                                scipy.stats.t.sf((margin + drop) / spread.error, spread.freedom)))
        if differ < FEW:                                                 # as many of `margin` of the units, or fewer, by chance
            equivalence = max(equivalence, float(scipy.stats.binom.cdf(differ, spread.units, margin)))
    of_example = np.concatenate([d.mean(0) for d in D])
    scatter = float(of_example.std(ddof=1)) if len(of_example) > 1 else 0.0
    half = spread.half_width
    power = float(scipy.stats.t.ppf(POWER, spread.freedom)) * spread.error if spread.error < math.inf else 1.0
    return {
        "drop": drop, "interval": (max(-1.0, drop - half), min(1.0, drop + half)),
        "standard_error": spread.error if math.isfinite(spread.error) else None, "p_equivalence": equivalence, "margin": margin,
        "training_noise_interval": training_noise(np.mean([d.mean(1) for d in D], axis=0)),
        "cohens_h": 2 * (math.asin(math.sqrt(a)) - math.asin(math.sqrt(b))), "d_z": drop / scatter if scatter > 0 else None,
        "smallest": min(1.0, half + power), "splits": len(D),
    }


def p_values_of_mean(D: np.ndarray, spread: Spread, groups: np.ndarray | None) -> tuple[float, float]:
    """Of the mean of D (R, n): the sign-flip test's, and that of the t test with the error of examples and runs. 1 where nothing can be shown."""
    return sign_flip_test(D.mean(0), groups), p_of_mean(float(D.mean()), spread)


def p_of_mean(mean: float, spread: Spread) -> float:
    """Two-sided, of the t test that it is 0."""
    return float(2 * scipy.stats.t.sf(abs(mean) / spread.error, spread.freedom)) if spread.error < math.inf else 1.0


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


@dataclass(frozen=True)
class Sample:
    """What one cell's runs made of the test rows of every split of a kind: by the split's name, each of `right` (R, n) on `rows` (n,)."""

    right: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    ratio: float                          # of test to training rows
    chance: float
    groups: np.ndarray | None             # (N,)

    def both(self, other: Sample) -> list[str]:
        """Splits that both have, run for run and row for row."""
        return [split for split, right in self.right.items() if split in other.right and right.shape == other.right[split].shape
                and np.array_equal(self.rows[split], other.rows[split])]

    def groups_on(self, split: str) -> np.ndarray | None:
        """Of its test rows."""
        return None if self.groups is None else self.groups[self.rows[split]]

    def minus(self, other: Sample, margin: float) -> dict | None:
        """What is to be said about the difference; None if they have nothing in common."""
        splits = self.both(other)
        if not splits:
            return None
        first, second = ([sample.right[split] for split in splits] for sample in (self, other))
        rows = [self.rows[split] for split in splits]
        if len(splits) == 1:
            return difference(first[0], second[0], margin, self.groups_on(splits[0]))
        return difference_over_splits(first, second, margin, rows, self.ratio, self.groups)

    def spread(self, D: dict[str, np.ndarray]) -> Spread:
        """Of the mean of D[split] (R, n) over splits, runs and examples."""
        if len(D) == 1:
            (split, only), = D.items()
            return spread_of_mean(only, self.groups_on(split))
        return spread_over_splits(list(D.values()), [self.rows[split] for split in D], self.ratio, self.groups)

    @property
    def accuracy(self) -> dict:
        """Mean accuracy with its 95 % interval for new examples and runs, not shorter than Wilson's, and two errors that are often confused.

        `p_above_chance` is that of a one-sided t test. `binomial_error` is that of the mean accuracy on n independent examples,
        `seeds_std` the std over the runs; where the latter is smaller, an interval over seeds is narrower than what the test set
        allows.
        """
        right = {split: of_split.astype(np.float64) for split, of_split in self.right.items()}
        spread, mean = self.spread(right), float(np.mean([of_split.mean() for of_split in right.values()]))
        R, n = next(iter(right.values())).shape
        low, high = mean - spread.half_width, mean + spread.half_width
        if self.groups is None:                                          # near 0 and 1 a t interval of few errors is too short
            wilson = scipy.stats.binomtest(round(mean * spread.units), spread.units).proportion_ci(1 - LEVEL, method="wilson")
            low, high = min(low, wilson.low), max(high, wilson.high)
        error, seeds = binomial_error(mean, n), float(np.mean([of_split.mean(1).std() for of_split in right.values()]))
        above = float(scipy.stats.t.sf((mean - self.chance) / spread.error, spread.freedom)) if spread.error < math.inf else 1.0
        return {"accuracy": mean, "interval": (max(0.0, low), min(1.0, high)), "binomial_error": error, "p_above_chance": above,
                "standard_error": spread.error if math.isfinite(spread.error) else None, "splits": len(right),
                "seeds_std": seeds if R > 1 else None, "seeds_narrower_than_test_set": R > 1 and seeds < error}


def samples_of(predictions: dict[Cell, dict[str, np.ndarray]], groups: np.ndarray | None) -> dict[str, dict[Cell, Sample]]:
    """By kind of split ("" for the first), of every cell without its split. The draws of random_half are joined run by run and example by example."""
    found: dict[str, dict[Cell, dict[str, dict]]] = {}
    for cell, arrays in predictions.items():
        found.setdefault(cell.split.rstrip("0123456789"), {}).setdefault(cell._replace(split=""), {})[cell.split] = arrays
    samples: dict[str, dict[Cell, Sample]] = {}
    for kind, cells in found.items():
        of_kind = samples.setdefault(kind, {})
        for cell, splits in cells.items():
            right = {split: arrays["test_predictions"] == arrays["test_labels"] for split, arrays in splits.items()}
            rows = {split: arrays["test_rows"] for split, arrays in splits.items()}
            of_kind[cell] = Sample(right, rows, float(np.mean([len(arrays["test_rows"]) / len(arrays["train_rows"]) for arrays in splits.values()])),
                                   float(np.mean([chance_level(arrays["test_labels"]) for arrays in splits.values()])), groups)
        halves: dict[Cell, list[Sample]] = {}
        for cell, sample in of_kind.items():
            if group_of(cell.layer_set) == "random_half":
                halves.setdefault(cell._replace(layer_set="random_half"), []).append(sample)
        for cell, draws in halves.items():
            splits = [split for split in draws[0].right if all(split in draws[0].both(draw) for draw in draws)]
            if splits:
                of_kind[cell] = replace(draws[0], right={split: np.mean([draw.right[split] for draw in draws], axis=0) for split in splits})
    return samples


def infer(predictions: dict[Cell, dict[str, np.ndarray]], groups: np.ndarray | None, margin: float, kind: str = "random") -> dict:
    """What the saved predictions of a run's cells say. `groups` (N,) are the groups of the data set's rows, if any; `kind` is the first split's.

    `accuracies` of each cell with its interval for new examples and runs, over all splits of its kind; `comparisons` of two
    layer sets, representation by representation, `p_holm` adjusted over these; `classifiers`, the first comparison by each of
    those beside the MLP; `ranking` of every two representations with all layers, adjusted over the pairs; `inflation`, what a
    random or stratified split has above a grouped one; `controls`; the chance level, and how many test rows share their group
    with a training row.
    """
    # a split that is called the first of its kind, but is not '', was left by a command with kinds in another order: '' is the same
    predictions = {cell: arrays for cell, arrays in predictions.items() if not cell.audit and cell.split != f"{kind}0"}
    shuffled = {cell: predictions.pop(cell) for cell in list(predictions) if cell.labels}
    samples = joined(samples_of(predictions, groups), kind)
    table = {cell: sample for cell, sample in samples.get(kind, {}).items() if cell.plain}
    if not table:
        return {}
    arrays = next(predictions[cell] for cell in predictions if cell.plain)
    labels, rows = arrays["test_labels"], arrays["test_rows"]
    of_test = groups[rows] if groups is not None else None
    representations = list(dict.fromkeys(cell.representation for cell in table))
    found = {
        "test_rows": len(rows), "margin": margin, "chance": chance_level(labels), "level": LEVEL, "power": POWER, "split": kind,
        "splits": max(len(sample.right) for sample in table.values()),
        "runs": max(len(of_split) for sample in table.values() for of_split in sample.right.values()),
        "groups": None if groups is None else int(len(np.unique(of_test))),
        "test_rows_that_share_a_group_with_training": None if groups is None else int(np.isin(of_test, groups[arrays["train_rows"]]).sum()),
        "accuracies": {cell.name: sample.accuracy for cell, sample in samples[kind].items() if cell.layer_set != "random_half"},
    }
    everywhere = np.unique(np.concatenate([of_split for sample in table.values() for of_split in sample.rows.values()]))
    units = len(everywhere) if groups is None else len(np.unique(groups[everywhere]))
    found["comparisons"] = [compared(samples[kind], representations, first, second, margin, units) for first, second in COMPARISONS]
    found["comparisons"] = [comparison for comparison in found["comparisons"] if comparison["entries"]]
    found["classifiers"] = [{"classifier": classifier, **compared(samples[kind], representations, *COMPARISONS[0], margin, units, classifier)}
                            for classifier in CLASSIFIERS if any(cell.classifier == classifier for cell in samples[kind])]
    found["ranking"] = ranked({name: table[Cell(name, "all_layers")] for name in representations if Cell(name, "all_layers") in table})
    found["inflation"] = [entry for first in samples if first != "grouped" for entry in inflation(samples, first)] if "grouped" in samples else []
    found["controls"] = [{"cell": cell.name, "representation": cell.representation, "layer_set": cell.layer_set, **found["accuracies"][cell.name]}
                         for cell in samples[kind] if cell.control]
    found["shuffled"] = shuffled_labels(shuffled) if shuffled else None
    return found


def joined(samples: dict[str, dict[Cell, Sample]], kind: str) -> dict[str, dict[Cell, Sample]]:
    """The first split of a kind, whose name is '', with its further ones."""
    found = {other: of_kind for other, of_kind in samples.items() if other not in ("", kind)}
    first, further = samples.get("", {}), samples.get(kind, {})
    found[kind] = {cell: sample if cell not in further else
                   replace(sample, right=sample.right | further[cell].right, rows=sample.rows | further[cell].rows) for cell, sample in first.items()}
    return found


def compared(samples: dict[Cell, Sample], representations: list[str], first: str, second: str, margin: float, units: int,
             classifier: str = "") -> dict:
    """Two layer sets, representation by representation; `units` examples or groups are all that there are."""
    entries = []
    for representation in representations:
        a, b = (samples.get(Cell(representation, layer_set, classifier=classifier)) for layer_set in (first, second))
        entry = a.minus(b, margin) if a and b else None
        if entry is not None:
            entries.append({"representation": representation, **entry})
    adjust(entries)
    if 2 / 2**min(units, 64) * len(entries) >= LEVEL:                    # no flipping of so few signs is rare enough
        for entry in entries:
            entry["smallest"] = entry["smallest"] if entry["splits"] > 1 else None
    return {"first": first, "second": second, "entries": entries}


def ranked(samples: dict[str, Sample]) -> list[dict]:
    """Every two representations, the better first."""
    pairs = []
    for better, worse in itertools.combinations(sorted(samples, key=lambda name: -samples[name].accuracy["accuracy"]), 2):
        a, b = samples[better], samples[worse]
        # kernel_ridge's one run beside each of the other's
        D = {split: a.right[split].astype(np.float64) - b.right[split] for split in a.right if split in b.right}
        if not D:
            continue
        mean = float(np.mean([d.mean() for d in D.values()]))
        p = p_of_mean(mean, a.spread(D))
        if len(D) == 1:
            (split, d), = D.items()
            p = max(p, sign_flip_test(d.mean(0), a.groups_on(split)))
        pairs.append({"better": better, "worse": worse, "difference": mean, "p": p})
    adjust(pairs)
    return pairs


def inflation(samples: dict[str, dict[Cell, Sample]], first: str) -> list[dict]:
    """Accuracy of the table's cells on splits of the kind `first` less that on grouped ones, with Welch's test and 95 % interval.

    Welch's, because they have other test rows; `p_holm` over the cells.
    """
    entries = []
    for cell, sample in samples[first].items():
        other = samples["grouped"].get(cell)
        if other is None or not cell.plain or group_of(cell.layer_set) or cell.layer_set in LAYER_SET_GROUPS:
            continue
        parts = [one.spread({split: right.astype(np.float64) for split, right in one.right.items()}) for one in (sample, other)]
        mean = sample.accuracy["accuracy"] - other.accuracy["accuracy"]
        error = math.hypot(*(part.error for part in parts))
        half, p = math.inf, 1.0
        if error < math.inf:
            freedom = error**4 / sum(part.error**4 / part.freedom for part in parts)
            half = max(float(scipy.stats.t.ppf(1 - LEVEL / 2, freedom)) * error, *(part.half_width for part in parts))
            p = float(2 * scipy.stats.t.sf(abs(mean) / error, freedom))
        entries.append({"cell": cell.name, "split": first, "accuracy": sample.accuracy["accuracy"], "grouped": other.accuracy["accuracy"],
                        "inflation": mean, "interval": (max(-1.0, mean - half), min(1.0, mean + half)), "p": p})
    adjust(entries)
    return entries


def shuffled_labels(predictions: dict[Cell, dict[str, np.ndarray]]) -> dict:
    """Whether the test labels of cells that were trained on shuffled labels can be told from the same labels in any other order.

    They must not: in the shuffled data a test row's label is any other's as well. `p` is that of the largest accuracy of all
    cells, each in standard deviations above its own mean, among SHUFFLES permutations of the test labels (the max-T test of
    Westfall and Young 1993, which keeps the family-wise error exactly); so many of the runs without a fault are called
    `suspect` as SUSPECT says. `cells` has the same for each cell.
    """
    arrays = list(predictions.values())
    labels = arrays[0]["test_labels"]
    counts = np.stack([(of_cell["test_predictions"][:, :, None] == np.arange(labels.max() + 1)).mean(0) for of_cell in arrays])   # (cells, n, C)
    rng, rows = np.random.default_rng(SEED), np.arange(len(labels))
    orders = [labels, *(rng.permutation(labels) for _ in range(SHUFFLES))]
    accuracies = np.stack([counts[:, rows, order].mean(1) for order in orders])                                                  # (1 + B, cells)
    spread = accuracies.std(0)
    z = (accuracies - accuracies.mean(0)) / np.where(spread > 1e-12, spread, 1.0)
    largest = z.max(1)
    cells = {cell.name: {"accuracy": float(accuracies[0, i]), "expected": float(accuracies[:, i].mean()), "spread": float(spread[i]),
                         "p_adjusted": float((largest >= z[0, i] - 1e-9).mean())} for i, cell in enumerate(predictions)}
    p = min(cell["p_adjusted"] for cell in cells.values())
    return {"p": p, "level": SUSPECT, "suspect": p < SUSPECT, "cells": cells}


def adjust(entries: list[dict]) -> None:
    """Add to each what Holm makes of its p-values among those of all."""
    for key in ("p", "p_equivalence"):
        if entries and key in entries[0]:
            for entry, adjusted in zip(entries, holm([entry[key] for entry in entries]), strict=True):
                entry[f"{key}_holm"] = adjusted


MANY_SPLITS = 5            # from which the corrected test over splits is worth more than its price
FEWEST_RUNS = 3            # from which how runs differ is known well enough for a claim about new ones


def verdict(found: dict) -> str:
    """One paragraph of what `infer` found about the drop without the text layers, with its conditions and no more than it shows.

    {} of `found` means that train, validation and test are the same rows.
    """
    if not found:
        return "No verdict: there is no finished cell, or train, validation and test are the same rows."
    return " ".join([*suspicion(found), drop_verdict(found), *nuisances(found)])


def suspicion(found: dict) -> list[str]:
    """What shuffled labels say of the run, if they were tried."""
    check = found["shuffled"]
    if check is None:
        return []
    if not check["suspect"]:
        return [f"With shuffled labels no cell is shown to be above chance (p = {check['p']:.3f} for all {len(check['cells'])} together, by the MLP "
                "on the first split)."]
    cells = [f"{name} ({100 * cell['accuracy']:.1f} % where {100 * cell['expected']:.1f} % are due)"
             for name, cell in check["cells"].items() if cell["p_adjusted"] < check["level"]]
    return [f"SUSPECT: trained on shuffled labels, {', '.join(cells)} {'is' if len(cells) == 1 else 'are'} above chance "
            f"(p = {check['p']:.4f} for all {len(check['cells'])} cells together, less than {check['level']:g}): something other than the weights "
            "tells the label, and until it is found no number here means what it seems to."]


def nuisances(found: dict) -> list[str]:
    """What the metadata alone tell, if they were tried."""
    entry = next((entry for entry in found["controls"] if entry["representation"] == "metadata"), None)
    if entry is None:
        return []
    share = f"{100 * entry['accuracy']:.1f} % (95 % interval {100 * entry['interval'][0]:.1f} to {100 * entry['interval'][1]:.1f}, chance "
    share += f"{100 * found['chance']:.1f} %)"
    if entry["p_above_chance"] < LEVEL:
        return [f"The metadata columns alone, without any weight, give {share}: what the weights tell may in part be how the LoRAs were made."]
    return [f"The metadata columns alone are not shown to tell the class: {share}."]


def drop_verdict(found: dict) -> str:
    main = next((one["entries"] for one in found["comparisons"] if (one["first"], one["second"]) == COMPARISONS[0]), [])
    if not main:
        return "No verdict: no representation was run with all layers and with the visual layers alone."
    if found["runs"] < FEWEST_RUNS:
        return f"No verdict: {found['runs']} runs a cell do not tell how runs differ; --num-runs {FEWEST_RUNS} or more would."
    splits, kind = found["splits"], found["split"]
    fewer = {entry["representation"]: entry["splits"] for entry in main if entry["splits"] < splits}
    cells = [found["accuracies"][f"all_layers_{entry['representation']}"] for entry in main]
    able = [entry for entry, p in zip(main, holm([cell["p_above_chance"] for cell in cells]), strict=True) if p < LEVEL]
    unable = [entry["representation"] for entry in main if entry not in able]
    lost = [entry for entry in able if entry["p_holm"] < LEVEL and entry["drop"] > 0]
    gained = [entry for entry in able if entry["p_holm"] < LEVEL and entry["drop"] < 0]
    same = [entry for entry in able if entry["p_equivalence_holm"] < LEVEL and entry not in lost + gained]
    open_ = [entry for entry in able if entry not in lost + gained + same]
    sample = f"{found['test_rows']} test rows" if found["groups"] is None else f"{found['groups']} groups of test rows"
    sample += f" in each of {splits} splits" if splits > 1 else ""
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
    if 1 < splits < MANY_SPLITS:
        parts.append(f"With {splits} splits the corrected test has little power (degrees of freedom: {splits - 1}): --num-splits {MANY_SPLITS} or "
                     "more, or one, would show more.")
    halves = next((one["entries"] for one in found["comparisons"] if (one["first"], one["second"]) == COMPARISONS[4]), [])
    if halves:
        worse = [entry for entry in halves if entry["p_holm"] < LEVEL and entry["drop"] > 0]
        better = [entry for entry in halves if entry["p_holm"] < LEVEL and entry["drop"] < 0]
        parts.append("Against random halves of the modules, which lose as many, accuracy with the visual layers is "
                     + (f"lower for {', '.join(map(points, worse))}" if worse else "not shown to be lower for any representation")
                     + (f", and higher for {', '.join(entry['representation'] for entry in better)}" if better else "") + ".")
    on = f"one {kind} split" if splits == 1 else f"{splits} {kind} splits"
    on += f" ({', '.join(f'{name}: {number}' for name, number in fewer.items())})" if fewer else ""
    parts.append(f"These are statements about new examples and new runs of this data set's kind, on {on}"
                 + ("." if halves else "; fewer columns are left without the text layers, so a fall alone does not say that the text layers know "
                    "something which the visual ones do not (--layer-sets random_half would tell the two apart)."))
    shared = found["test_rows_that_share_a_group_with_training"]
    inflated = [one for one in found["inflation"] if one["split"] == kind or kind == "grouped"]
    if inflated:
        clear = [one for one in inflated if one["p_holm"] < LEVEL and one["inflation"] > 0]
        mean = float(np.mean([one["inflation"] for one in inflated]))
        parts.append(f"On grouped splits, where no test row shares its group with a training row, accuracy came out {100 * abs(mean):.1f} points "
                     f"{'lower' if mean >= 0 else 'higher'} in the mean of {len(inflated)} cells; it is shown to be lower for "
                     f"{len(clear) or 'none'} of them (after Holm's correction).")
    elif shared:
        parts.append(f"{shared} of {found['test_rows']} test rows share their group with a training row: for new groups accuracies may be lower and "
                     "drops others.")
    return " ".join(parts)
