"""The page that follows a run, --status, --watch and --dry-run."""

import json
import sys
import time
from pathlib import Path

import pytest
from builders import lora_dataset
from running import FAST, checkpoints, folder, never, snapshot, visible

from ablation import status as program_status
from ablation.catalogue import SPECS
from ablation.status import FITTED_BYTES

# --- the report


@pytest.fixture
def two_figures(monkeypatch):
    """A report with two of its figures, in a resolution that is soon drawn: all of them take seconds."""
    from ablation.report import figures, write

    monkeypatch.setattr(figures, "FIGURES", {name: figures.FIGURES[name] for name in ("accuracy", "drop")})
    monkeypatch.setattr(write, "RESOLUTION", 40)


@pytest.mark.slow
@pytest.mark.usefixtures("two_figures")
def test_the_page_follows_a_run_and_an_unchanged_one_leaves_it(run, place, monkeypatch):
    from ablation.report import write

    pages, real = [], write.refresh
    monkeypatch.setattr(
        write,
        "refresh",
        lambda folder, *rest: (real(folder, *rest), pages.append((folder / "report.html").read_text())),
    )
    chosen = ("--representations", "stats", "frequency", "--report")
    status, log = run(*chosen)
    assert (
        status == 0
        and len(pages) == 4
        and [f"Running: {n} of 4 cells were finished" in page for n, page in enumerate(pages, 1)]
        == [True] * 4
    )
    assert "report.html" in log and visible(folder(place)) == [
        "checkpoints",
        "events.jsonl",
        "figures",
        "manifest.json",
        "predictions",
        "report.html",
        "results.json",
        "results.txt",
        "tables",
    ]
    assert {"accuracy.png", "accuracy.pdf", "drop.png"} <= set(visible(folder(place) / "figures"))
    before = snapshot(folder(place) / "figures")
    page = (folder(place) / "report.html").stat().st_mtime_ns
    assert (
        run(*chosen)[0] == 0
        and snapshot(folder(place) / "figures") == before
        and (folder(place) / "report.html").stat().st_mtime_ns == page
    )
    run("--representations", "stats", "frequency", "spectral", "--report")
    assert (folder(place) / "report.html").stat().st_mtime_ns > page and "spectral" in (
        folder(place) / "tables" / "accuracy.csv"
    ).read_text()


@pytest.mark.usefixtures("two_figures")
@pytest.mark.parametrize("what", ["refresh", "write_report"])
def test_a_report_that_cannot_be_made_costs_no_result(run, place, monkeypatch, what):
    from ablation.report import write

    monkeypatch.setattr(write, what, lambda *rest: 1 / 0)
    status, log = run("--representations", "stats", "--report")
    assert (
        status == 0
        and "could not be written: ZeroDivisionError: division by zero; scripts/report.py makes it anew"
        in log
    )
    # Two of them hidden locks.
    assert len(checkpoints(place)) == 2 + 2 and (folder(place) / "results.json").exists()


@pytest.mark.usefixtures("two_figures")
def test_an_error_of_tensorboard_costs_neither_a_cell_nor_the_page(run, place, monkeypatch):
    monkeypatch.setattr("ablation.tensorboard.check_installed", lambda: None)
    monkeypatch.setattr("ablation.tensorboard.log_curves", never)
    status, log = run(
        "--representations", "stats", "--tensorboard", fast=[flag for flag in FAST if flag != "--no-report"]
    )
    assert status == 0 and log.count("the curves of TensorBoard could not be written") == 2
    assert "the page could not be written" not in log and (folder(place) / "report.html").exists()


def test_tensorboard_is_asked_for_before_the_work(run, place, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = Path(folder)

        def add_scalar(self, name, value, epoch):
            written.append((self.folder.parent.name, self.folder.name, name, value, epoch))

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, log = run("--representations", "stats", "--tensorboard")
    assert status == 2 and "--tensorboard needs the package tensorboard" in log and not folder(place).exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    assert run("--representations", "stats", "--tensorboard")[0] == 0
    curve = json.loads((folder(place) / "checkpoints" / "visual_only_stats.json").read_text())[
        "learning_curves"
    ][1]
    assert [entry[3:] for entry in written if entry[:3] == ("visual_only_stats", "run_2", "val_acc")] == [
        (value, epoch) for epoch, value in enumerate(curve["val_acc_history"], 1)
    ]


def test_watching_a_status_tells_the_rate_and_ends_with_the_run(run, place, monkeypatch):
    status, log = run("--status", "--watch", "--representations", "stats")
    assert (
        status == 0
        and "0/2 cells done, 0 failed, 0 running, 2 left" in log
        and "No run is working on this folder" in log
    )
    assert run("--watch")[0] == 2
    run("--representations", "stats")
    assert (
        "2/2 cells done, 0 failed, 0 running, 0 left"
        in run("--status", "--watch", "--representations", "stats")[1]
    )
    (folder(place) / "checkpoints" / "visual_only_stats.json").unlink()
    with (folder(place) / "events.jsonl").open("a") as file:
        begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 30))
        file.write(
            json.dumps({"time": begun, "event": "started"})
            + "\n"
            + json.dumps({"time": begun, "event": "finished"})
            + "\n{cut"
        )
    monkeypatch.setattr(program_status, "is_held", lambda folder: len(asked) < 2)
    asked = []
    monkeypatch.setattr(program_status.time, "sleep", asked.append)
    log = run("--status", "--watch", "--representations", "stats")[1]
    assert (
        "1/2 cells done, 0 failed, 1 running, 0 left | Rate: " in log
        and "cells/min | ETA: " in log
        and len(asked) == 2
    )


# --- questions


def test_status_tells_what_is_finished_stale_and_damaged_and_moves_nothing(run, place):
    assert "Total Progress:       0/18 (0.0%)" in run("--status")[1]
    run("--representations", "stats", "frequency")
    path = folder(place) / "checkpoints" / "all_layers_stats.json"
    path.write_bytes(path.read_bytes()[:-9])
    before = snapshot(folder(place) / "checkpoints")
    status, log = run("--status", "--representations", "stats", "frequency")
    assert (
        status == 0
        and "All Layers Config:    1/2 completed, 1 remaining" in log
        and "all_layers_stats is damaged" in log
    )
    for change, words in (
        (["--split-seed", "7"], "split_seed was 42, is now 7"),
        (["--label-column", "group"], "label_column was category_label"),
    ):
        status, log = run("--status", "--representations", "frequency", *change)
        assert "Total Progress:       0/2 (0.0%)" in log and words in log
    status, log = run("--status", "--representations", "stats", "frequency", "--dropout", "0.1")
    assert (
        status == 0
        and "Total Progress:       0/4 (0.0%)" in log
        and "visual_only_stats is stale: dropout was 0.5, is now 0.1" in log
    )
    assert snapshot(folder(place) / "checkpoints") == before


def test_dry_run_tells_what_would_run_why_and_what_it_needs(run, place):
    lora_dataset(n=40).to_parquet("loras.parquet")
    status, log = run("--dry-run", dataset="loras.parquet")
    assert (
        status == 0
        and "all_layers_stats             runs: no checkpoint" in log
        and "Arrow copy" in log
        and "40 rows, 16 layers" in log
    )
    assert not (place / "visual-ablation-results").exists() and not (place / ".feature_cache").exists()
    run("--representations", "stats")
    status, log = run("--dry-run", "--representations", "stats", "spectral", "--num-runs", "3")
    assert (
        "all_layers_stats             stops the run, or runs with --rerun-stale: num_runs was 2, is now 3"
        in log
    )
    status, log = run("--dry-run", dataset="100k")
    assert "100000 rows, 128 layers, 39.86 GB of weights" in log and "4.61 GB feature cache" in log
    assert "Memory:  13.72 GB while the largest cell trains" in log
    assert "39.86 GB Arrow copy" in log and "39.86 GB download" in log
    assert "not known before the download" in run("--dry-run", dataset="someone/their-loras")[1]
    assert run("--dry-run", dataset="2k")[0] == 2


def test_the_plan_knows_the_size_of_every_fitted_representation():
    assert set(FITTED_BYTES) == {name for name, spec in SPECS.items() if spec.fitted}
