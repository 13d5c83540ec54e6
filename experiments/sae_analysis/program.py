"""What both versions do around their measuring: settings, samples, the toy, the run's folder, results."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from ablation.log import close_log
from checkpointing import Held, Refused, replacing

from . import EXPERIMENTS, AnalysisError, InputError
from .language_model import describe
from .progress import Clock, Progress, log, log_to_stdout, peak_memory
from .runs import Run, describe_samples, opened, read_manifest
from .samples import Sample, read_samples, spread
from .settings import TINY, Settings, parse_settings, parser_of, resolve_device, resumed_folder
from .summary import as_text, compare
from .toy import LAYERS as TOY_DEPTH
from .toy import WARNING, make_toy

TOYS = EXPERIMENTS / "06_comprehensive_analysis" / "toys"


class Work(NamedTuple):
    """What a version measures, and where it reports to."""

    settings: Settings
    samples: list[Sample]
    toy: Path | None
    run: Run
    clock: Clock

    def progress(self, texts: int) -> Progress:
        """The progress of this run; `texts` is how many texts are still to be read."""
        return Progress(len(self.samples), len(self.run.rows), texts)


def main(argv: list[str] | None, description: str, measure: Callable[[Work], Any], batched: bool) -> int:
    """Run a version as a command. `measure` adds every missing row to the run. Returns the exit status."""
    log_to_stdout()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        analyse(argv, description, measure, batched)
        close_log()
        return 0
    except (InputError, Refused) as error:
        message, status = str(error), 2
    except Held as error:
        message, status = str(error), 3
    except AnalysisError as error:
        message, status = str(error), 1
    except KeyboardInterrupt:
        message, status = "stopped: --resume goes on with a run that has begun", 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message, status = f"cannot write ({error.strerror}): make room, then --resume the run", 1
    close_log()
    print(message, file=sys.stderr)
    return status


def analyse(argv: list[str] | None, description: str, measure: Callable[[Work], Any], batched: bool) -> None:
    """Measure the samples, and write table, summary and figure. Raises InputError and AnalysisError."""
    parser = parser_of(description, batched)
    resumed = resumed_folder(argv)
    before = read_manifest(resumed) if resumed else {}
    settings = parse_settings(parser, argv, before)
    if before.get("status") == "finished":
        log.info(f"{resumed} is finished: nothing is left to do")
        return
    clock = Clock(resolve_device(settings.device))
    folder = Path(settings.data_dir)
    every = read_samples(folder, settings.domains)
    samples = spread(every, settings.max_samples)
    if not samples:
        raise InputError(f"no samples in {folder}: give another --data-dir or --domains")
    toy = toy_of(settings, every)
    with opened(
        settings, describe(settings, toy), describe_samples(folder, settings.domains, len(samples))
    ) as run:
        log.info(f"Run: {run.folder}")
        if run.rows:
            log.info(f"Resumed: {len(run.rows)} of {len(samples)} samples are finished")
        with clock("measuring"):
            measure(Work(settings, samples, toy, run, clock))
        with clock("write"):
            write_results(run, samples, settings)
        report(run, clock)


def toy_of(settings: Settings, samples: list[Sample]) -> Path | None:
    """The folder of the toy, trained if need be; None for another model. Raises InputError."""
    if settings.model != TINY:
        return None
    log.info(WARNING)
    if settings.layers[-1] >= TOY_DEPTH:
        raise InputError(f"--layers {settings.layers[-1]}: the toy has layers 0 to {TOY_DEPTH - 1}")
    return make_toy(TOYS, [text for sample in samples for text in sample.texts], settings.layers)


def write_results(run: Run, samples: list[Sample], settings: Settings) -> None:
    """Write metrics.parquet, summary.csv and the figure, and log the summary."""
    from .dashboard import draw

    table = run.write_table([sample.id for sample in samples], settings.layers)
    comparison = compare(table, settings.layers)
    with replacing(run.folder / "summary.csv") as temporary:
        comparison.with_columns(model=pl.lit(settings.model)).write_csv(temporary)
    for line in as_text(comparison):
        log.info(line)
    draw(table, comparison, run.folder / "figures", run.manifest)


def report(run: Run, clock: Clock) -> None:
    """Log where the results are and where the time went."""
    seconds = {stage: round(value, 2) for stage, value in clock.by_stage.items()}
    run.write_manifest(seconds=seconds, peak_memory=peak_memory())
    log.info("Seconds: " + ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items()))
    if "warning" in run.manifest:
        log.info(run.manifest["warning"])
    log.info(f"Results: {run.folder}/metrics.parquet, summary.csv, figures/comprehensive_dashboard.png")
