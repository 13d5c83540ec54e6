"""The short form of scripts/crash_test.py: kills, damage, signals, and random actions beside a model."""

import crash_test
import pytest

from ablation.endurance import damages, interrupts, kills, soak
from ablation.endurance.trial import prepared
from checkpointing import ResultStore


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with prepared(tmp_path_factory.mktemp("endurance") / "work") as trial:
        yield trial


def faults(table, names):
    """What went wrong, by row."""
    return {
        row: {name: counts[name] for name in names if counts[name]}
        for row, counts in table.items()
        if any(counts[name] for name in names)
    }


@pytest.mark.slow
def test_killed_at_every_moment_nothing_is_lost_torn_or_made_again(whole):
    table = kills.kill_rounds(whole, whole.place.parent, 8)
    assert faults(table, kills.FAULTS) == {}
    assert sum(counts["kills"] for counts in table.values()) >= 8
    assert all(table[moment]["kills"] for moment in ("cached", "committed", "between"))


@pytest.mark.slow
def test_every_damage_is_noticed_and_no_number_is_wrong(whole):
    table = damages.damage_rounds(whole, whole.place.parent, 1, 2, sampled=24)
    assert faults(table, damages.DAMAGE_FAULTS) == {}
    assert sum(counts["damages"] for counts in table.values()) == 24


@pytest.mark.slow
def test_signals_end_a_run_with_their_status_and_lose_nothing(whole):
    table = interrupts.signal_rounds(whole, whole.place.parent, 2)
    assert faults(table, interrupts.SIGNAL_FAULTS) == {}


@pytest.mark.slow
def test_after_random_actions_the_results_are_those_of_an_unbroken_run(whole):
    counts = soak.soak(whole.place.parent, 12)
    assert faults({"all": counts}, soak.SOAK_FAULTS) == {}


def test_a_cell_that_is_lost_or_made_again_is_counted(whole, monkeypatch):
    """The test above can fail: a store that writes every cell twice, and one that writes none."""
    real = ResultStore.state
    monkeypatch.setattr(ResultStore, "state", lambda *what: real(*what)._replace(kind="missing"))
    table = kills.kill_rounds(whole, whole.place.parent, 1, seed=1)
    assert sum(counts["ended otherwise"] for counts in table.values())


def test_the_command_prints_a_table_and_its_status_says_if_anything_was_wrong(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(crash_test, "prepared", lambda folder: prepared(tmp_path / "work"))
    assert crash_test.main(["--test", "soak", "--rounds", "2"]) == 0
    assert "wrong results" in capsys.readouterr().out
    broken = soak.Counts({"kill": 1, "hangs": 1})
    monkeypatch.setattr(crash_test, "soak", lambda *what: broken)
    assert crash_test.main(["--test", "soak"]) == 1
