"""The opening of the verdict follows from three facts, as the table of docs/statistics.md says."""

import itertools

import pytest
from conftest import ROOT

from ablation import opening as sentences
from ablation.opening import Facts, facts_of, meaning, opening
from ablation.simulated_openings import COLLECTIONS, simulate_openings
from ablation.verdict import half_by_half_sentences

OUTCOMES = ("falls", "rises", "same", "open")
PLACES = {"lower": "lower", "among": "among", "higher": "higher", "not read": ""}
MORE = {"text reads more": "text", "no difference": "none", "visual reads more": "visual", "not as many": ""}


def table():
    """The lines of the page's table: the facts that each is for, and its sentence."""
    page = (ROOT / "docs" / "statistics.md").read_text()
    section = page[page.index("## What the opening says") : page.index("## Cross-validation")]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]

    def named(cell, names):
        return list(names) if cell == "any" else cell.split(", ")

    return [
        (
            {*named(a, OUTCOMES)},
            {*named(b, [p for p in PLACES if p != "not read"])},
            {*named(c, MORE)},
            sentence,
        )
        for a, b, c, sentence in lines
    ]


def made_of(outcome="falls", place="among", more="none", drop=0.1):
    """An inference with these facts."""
    p_value = {"falls": (0.001, drop), "rises": (0.001, -drop), "same": (0.5, 0.001), "open": (0.5, 0.02)}
    p, found = p_value[outcome]
    primary = {
        "p": p,
        "drop": found,
        "interval": (found - 0.03, found + 0.03),
        "p_equivalence": 0.01 if outcome == "same" else 0.5,
        "margin": 0.02,
        "smallest": 0.04,
        "heterogeneity": 0.4,
    }
    entry = {
        "p_above_chance": 0.001,
        "fall": 0.08,
        "fall_of_halves": {"mean": 0.06, "middle": (0.02, 0.1)},
        "visual": {
            "p_lower": 0.005 if place == "lower" else 0.99,
            "p_higher": 0.99 if place == "lower" else 0.005,
        },
        "text_minus_visual": {
            "drop": -0.05 if more == "visual" else 0.05,
            "interval": (-0.08, -0.02) if more == "visual" else (0.02, 0.08),
        },
    }
    tests = [
        {"of": "mean", "what": "place", "p_holm": 0.5 if place == "among" else 0.02},
        {"of": "mean", "what": "text_minus_visual", "p_holm": 0.001 if more in ("text", "visual") else 0.5},
    ]
    null = (
        None if not place else {"mean": entry, "product": None, "is_text_equal": bool(more), "tests": tests}
    )
    return {
        "primary": primary,
        "score": "accuracy",
        "folds": {"folds": 5},
        "null": null,
        "null_problem": "why",
    }


@pytest.mark.parametrize("outcome, place, more", list(itertools.product(OUTCOMES, PLACES, MORE)))
def test_each_combination_of_facts_ends_with_the_sentence_of_the_page(outcome, place, more):
    lines = [
        sentence
        for outcomes, places, mores, sentence in table()
        if outcome in outcomes and place in places and more in mores
    ]
    assert len(lines) == 1, (outcome, place, more)
    inference = made_of(outcome, PLACES[place], MORE[more])
    assert facts_of(inference) == Facts(outcome, PLACES[place], MORE[more] if PLACES[place] else "")
    said = opening(inference)
    conclusions = [sentence for sentence in said if sentence.startswith("So ")]
    assert conclusions == ([] if lines[0] == "nothing more" else [lines[0]])


@pytest.mark.parametrize(
    "outcome, place, more", list(itertools.product(OUTCOMES, PLACES.values(), MORE.values()))
)
def test_every_sentence_is_short_and_the_claim_needs_its_facts(outcome, place, more):
    said = opening(made_of(outcome, place, more))
    assert all(len(sentence.split()) <= 25 for sentence in said), said
    text = " ".join(said)
    claims = sentences.HOLD_PART in text
    assert claims == (outcome == "falls" and bool(place) and (place == "lower" or more == "text"))
    assert ("falls by" in text) == (outcome == "falls")
    assert ("reads 5.0 points more" in text) == (bool(place) and more in ("text", "visual"))


def test_the_second_sentence_sets_the_fall_beside_that_of_a_random_half():
    falls = opening(made_of())
    assert falls[:3] == [
        "With the visual layers alone accuracy falls by 10.0 points on average (95 % interval 7.0 to 13.0).",
        "Keeping a random half of the layers loses as much: 6.0 points (middle 95 %: 2.0 to 10.0) by ridge "
        "regression.",
        "Keeping the visual half loses 8.0 points by the same reader.",
    ]
    assert "a random half of the layers loses less" in " ".join(opening(made_of(place="lower")))
    assert "a random half of the layers loses more" in " ".join(opening(made_of(place="higher")))
    unread = opening(made_of(place=""))
    assert unread[1].startswith("Layers are gone too") and unread[2].endswith("was read: why.")
    blind = made_of(place="lower")
    blind["null"]["mean"]["p_above_chance"] = 0.3
    assert facts_of(blind) == Facts("falls", "", "") and sentences.HOLD_PART not in opening(blind)
    assert opening(blind)[-1] == "The reader of random halves is not above chance."


def test_halves_that_gain_are_said_to_gain():
    gains = made_of("rises", "lower")
    gains["null"]["mean"] |= {"fall": -0.01, "fall_of_halves": {"mean": -0.03, "middle": (-0.06, 0.0)}}
    assert (
        "gains more: 3.0 points (middle 95 %: 0.0 to 6.0) by ridge regression. Keeping the visual half gains "
        "1.0" in " ".join(opening(gains))
    )


def test_halves_that_gain_beside_a_visual_half_that_loses():
    gains = made_of("open")
    gains["null"]["mean"] |= {"fall": 0.0004, "fall_of_halves": {"mean": -0.004, "middle": (-0.02, 0.01)}}
    assert opening(gains)[-3] == (
        "Keeping a random half of the layers gains 0.4 points (middle 95 %: -1.0 to 2.0) by ridge regression."
    )
    assert opening(gains)[-2] == "Keeping the visual half loses 0.0 points by the same reader."


def test_an_average_that_stays_the_same_says_what_it_hides():
    same = made_of("same")
    assert "Single representations may still differ." in opening(same)
    same["primary"]["heterogeneity"] = 0.001
    assert "differ in their drops" in " ".join(opening(same))
    same["primary"]["heterogeneity"] = None
    assert not any("representations" in sentence for sentence in opening(same))


def test_without_random_halves_nothing_is_concluded():
    assert meaning(made_of(place=""), Facts("falls", "", "")) == []


@pytest.mark.parametrize("name", ["only text layers hold the class", "every module holds a little"])
def test_of_simulated_collections_the_opening_says_what_is_true(name):
    found = simulate_openings(COLLECTIONS[name], 6, seed=1)
    assert found["right"] >= 5 / 6 and found["false"] <= 1 / 6


def with_product(inference, place="among", more="none", whole=0.9):
    """The same with a representation of the products."""
    null = inference["null"]
    of_mean = null["mean"]
    of_mean["all_layers"] = 0.3
    null["product"] = of_mean | {
        "representation": "product_sketch",
        "all_layers": whole,
        "halves": [0.5] * 199,
        "visual": {"rank": 1, "p_lower": 0.005, "p_higher": 1.0},
        "text_minus_visual": {"drop": 0.143, "interval": (0.107, 0.18)},
    }
    null["is_text_equal"] = True
    null["tests"] += [
        {"of": "product", "what": "place", "p_holm": 0.5 if place == "among" else 0.02},
        {"of": "product", "what": "text_minus_visual", "p_holm": 0.001 if more == "text" else 0.5},
    ]
    return inference


def test_what_the_products_show_is_not_called_nothing():
    said = opening(with_product(made_of(), more="text"))
    assert sentences.NOT_MORE not in said and said[-2].startswith("So these representations do not show")
    assert said[-1] == (
        "But by product_sketch, a stronger reader, the text half reads 14.3 points more than the visual half "
        "(95 % interval 10.7 to 18.0)."
    )
    assert "a reader of the products" in opening(with_product(made_of(), more="text", whole=0.2))[-1]
    assert opening(with_product(made_of(), place="lower"))[-1] == sentences.NOT_MORE  # text may be as low
    assert opening(with_product(made_of()))[-1] == sentences.NOT_MORE
    assert opening(with_product(made_of(place="lower"), more="text"))[-1] == sentences.HOLD_PART
    assert all(len(sentence.split()) <= 25 for sentence in opening(with_product(made_of(), more="text")))


def test_the_second_paragraph_has_what_each_half_reads():
    found = with_product(made_of(), more="text")
    scores = {"visual_only": 0.25, "text_only": 0.22, "random_half": 0.24}
    found["null"]["mean"] |= scores
    found["null"]["product"] |= {name: 0.6 + score for name, score in scores.items()}
    said = half_by_half_sentences(found)
    assert said == [
        "By ridge regression all layers read 30.0 %, the visual half 25.0 %, the text half 22.0 %, random "
        "halves 24.0 %.",
        "Text less visual: +5.0 points (95 % interval +2.0 to +8.0), not shown after the correction for all "
        "tests.",
        "product_sketch, a stronger reader: all layers read 90.0 %, the visual half 85.0 %, the text half "
        "82.0 %, random halves 84.0 %.",
        "Text less visual by it: +14.3 points (95 % interval +10.7 to +18.0), so by the products the text "
        "layers hold more.",
    ]
    assert all(len(sentence.split()) <= 26 for sentence in said)
    found["null"]["is_text_equal"] = False
    assert (
        len(half_by_half_sentences(found)) == 2
        and "the text layers 22.0 %" in half_by_half_sentences(found)[0]
    )
    assert half_by_half_sentences(made_of(place="")) == []
