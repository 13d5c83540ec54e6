"""The plan of analysis: stated before any cell is trained, and the same wherever it is found."""

import json

import numpy as np
from running import FAST, as_cells_begin, experiment_data, folder

from ablation.analysis_plan import GROUP_CORRELATION, analysis_plan, expectation, group_size
from ablation.conversion import build_settings


def plan_in(place):
    return json.loads((folder(place) / "results.json").read_text())["analysis_plan"]


def test_the_plan_is_stated_before_training_and_its_hash_is_everywhere(run, place, monkeypatch):
    shown = []
    as_cells_begin(monkeypatch, lambda: shown.append((folder(place) / "events.jsonl").read_text()))
    status, log = run("--representations", "stats", fast=FAST)
    first = plan_in(place)
    assert status == 0 and log.index("Plan of analysis") < log.index("PROGRESS SUMMARY")
    assert first["hash"] in shown[0] and first["hash"][:12] in log
    assert json.loads((folder(place) / "manifest.json").read_text())["analysis_plan"] == first["hash"]
    assert first["first_stated"] and first["other_plans"] == 0 and first["settings"]["margin"] == 0.02

    run("--representations", "stats", fast=FAST)
    assert plan_in(place) == first
    run("--representations", "stats", "--margin", "0.1", fast=FAST)  # chosen after the numbers were seen
    changed = plan_in(place)
    assert changed["hash"] != first["hash"] and changed["other_plans"] == 1
    run("--representations", "stats", "--cache-dir", "elsewhere", fast=FAST)
    assert plan_in(place)["hash"] == first["hash"] and plan_in(place)["other_plans"] == 1


def test_settings_that_came_later_are_no_part_of_the_plan_until_they_are_used(place):
    def settings_of(**values):
        return analysis_plan(build_settings(values), experiment_data())["settings"]

    later = {"architecture", "layer_sides"}
    assert not later & settings_of().keys()
    assert later & settings_of(architecture="sd").keys() == {"architecture"}
    assert later & settings_of(layer_sides={"visual": "*attn1*"}).keys() == {"layer_sides"}


def test_what_a_margin_needs_is_said_before_the_run():
    few, many = (expectation(build_settings({}), rows) for rows in (520, 5000))
    assert len(few) == 2 and "within 2 points cannot be shown below about 1,700 tested rows" in few[1]
    assert len(many) == 1 and "about 0.9 points" in many[0]
    assert len(expectation(build_settings({"margin": 0.1}), 520)) == 1
    assert len(expectation(build_settings({"margin_share": 0.1}), 520)) == 1


def test_rows_of_large_groups_are_expected_to_tell_less():
    assert group_size(None) == 1 and group_size(np.arange(520) // 2) == 2
    assert group_size(np.repeat([0, 1], [30, 10])) == (30**2 + 10**2) / 40
    settings = build_settings({})
    pairs, large = (expectation(settings, 520, size)[0] for size in (2, 26))
    assert "a mean drop of about 2.8 points" in pairs
    expected = 280 * 0.23 / np.sqrt(520) * np.sqrt((1 + 25 * GROUP_CORRELATION) / (1 + GROUP_CORRELATION))
    assert f"a mean drop of about {expected:.1f} points" in large and expected > 3.5
