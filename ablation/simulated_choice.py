"""Simulated experiments of nine representations: which of them should the primary hypothesis be about?"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ablation.estimators import LEVEL, holm
from ablation.family import mean_sample, p_above_chance, representations_that_read, retained
from ablation.samples import Sample
from ablation.worlds import CHANCE, FREE, ONE, ProbitWorld, answered, samples_of_world

RULES = ("first", "both", "all", "each")


def chosen_by_rules(pairs: dict[str, tuple[Sample, Sample]]) -> dict[str, list[str]]:
    """The representations of the primary hypothesis by each of the RULES, [] if it is not tested.

    `first`: those that are above chance with the first layer set (Holm). `both`: those whose mean of both is
    (Holm). `all`: all, if their mean with both is above chance. `each`: the program's, those whose mean of
    both is above chance, each tested alone.
    """
    names = list(pairs)
    of_first = [first.accuracy["p_above_chance"] for first, _ in pairs.values()]
    of_both = [p_above_chance(pair) for pair in pairs.values()]
    of_all = p_above_chance([sample for pair in pairs.values() for sample in pair])
    return {
        "first": [name for name, p in zip(names, holm(of_first), strict=True) if p < LEVEL],
        "both": [name for name, p in zip(names, holm(of_both), strict=True) if p < LEVEL],
        "all": names if of_all < LEVEL else [],
        "each": representations_that_read(pairs),
    }


class ChoiceOutcome(NamedTuple):
    """What one rule's choice came to in one experiment; NaN where nothing is stated of what is kept."""

    falls: float
    rises: float
    bias: float
    held: float
    kept: float


def outcome_of(chosen: list[tuple[Sample, Sample]], true_drop: float, true_above: float) -> ChoiceOutcome:
    """The outcome of the mean over the chosen representations, where they truly lose `true_drop` of the
    `true_above` that they have above chance.
    """
    first, second = (mean_sample([pair[i] for pair in chosen]) for i in (0, 1))
    one = answered(np.stack([first.right[""], second.right[""]]), first.runs, first.groups)
    kept, holds = retained(first, second), np.nan
    if kept is not None:
        holds = kept["interval"][0] <= 1 - true_drop / true_above <= kept["interval"][1]
    return ChoiceOutcome(
        one.claims and one.drop > 0,
        one.claims and one.drop < 0,
        one.drop - true_drop,
        one.holds(true_drop),
        holds,
    )


def simulate_choice(
    world: ProbitWorld, representations: tuple[ProbitWorld, ...], experiments: int, seed: int
) -> dict[str, dict[str, float]]:
    """Of each of the RULES: the share of experiments in which there is a primary hypothesis (`stated`), in
    which it `falls` or `rises`, and of the stated ones the `bias` of its drop, and how often its interval and
    that of what is `kept` hold the truth about the chosen representations.
    """
    rng = np.random.default_rng([seed, 2])
    found: dict[str, list[ChoiceOutcome]] = {rule: [] for rule in RULES}
    for _ in range(experiments):
        pairs, _ = samples_of_world(rng, world, representations)
        outcomes: dict[tuple[str, ...], ChoiceOutcome] = {}
        for rule, names in chosen_by_rules(pairs).items():
            key, of = tuple(names), [representations[int(name)] for name in names]
            if names and key not in outcomes:
                true_drop = float(np.mean([one.truth for one in of]))
                above = float(np.mean([one.recalls for one in of])) - CHANCE
                outcomes[key] = outcome_of([pairs[name] for name in names], true_drop, above)
            if names:
                found[rule].append(outcomes[key])
    rates = {}
    for rule, rows in found.items():
        table = np.array(
            [*rows, ChoiceOutcome(0, 0, np.nan, np.nan, np.nan)], float
        )  # a row too many: never empty
        means = [mean_where_known(column) for column in table.T]
        claims = table[:, :2].sum(0) / experiments
        numbers = dict(zip(ChoiceOutcome._fields, [*claims.tolist(), *means[2:]], strict=True))
        rates[rule] = {"stated": len(rows) / experiments, **numbers}
    return rates


def mean_where_known(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def nine(*accuracies: tuple[float, float]) -> tuple[ProbitWorld, ...]:
    """Nine representations with these accuracies and drops, the last of which counts for all further ones."""
    of = [*accuracies, *[accuracies[-1]] * 9][:9]
    return tuple(ProbitWorld(recalls=(accuracy,), drops=(drop,)) for accuracy, drop in of)


CHOICE_WORLDS = {
    "nine at 12 %, no drop": (ProbitWorld(), nine((0.12, 0.0))),
    "nine at 13 %, no drop": (ProbitWorld(), nine((0.13, 0.0))),
    "nine at 13 %, no drop, no groups": (FREE, nine((0.13, 0.0))),
    "nine at 12 %, no drop, overlap .3": (replace(FREE, overlap=0.3), nine((0.12, 0.0))),
    "nine at 15 %, no drop, one split of 105": (ONE, nine((0.15, 0.0))),
    "one at 33 %, eight at chance, no drop": (ProbitWorld(), nine((0.33, 0.0), (0.10, 0.0))),
    "nine at 33 %, no drop": (ProbitWorld(), nine((0.33, 0.0))),
    "nine from 14 to 12 %": (ProbitWorld(), nine((0.14, 0.02))),
    "one from 33 to 23 %, eight at chance": (ProbitWorld(), nine((0.33, 0.10), (0.10, 0.0))),
    "one from 60 to 50 %, eight at chance": (ProbitWorld(), nine((0.60, 0.10), (0.10, 0.0))),
    "three from 33 to 27 %, six at chance": (ProbitWorld(), nine(*[(0.33, 0.06)] * 3, (0.10, 0.0))),
    "three from 16 to 13 %, six at chance": (ProbitWorld(), nine(*[(0.16, 0.03)] * 3, (0.10, 0.0))),
    "nine from 33 to 30 %": (ProbitWorld(), nine((0.33, 0.03))),
}
