"""A small experiment to break: its data, the processes that run it, and what must be true of its folder.

A process is a fork of this one, which has imported torch and `datasets` before, so that a start takes a
fraction of a second; `fresh` ones are started from the shell and import everything themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from safetensors.numpy import load_file

# What the program imports only when it has work to do: forks find it imported.
import ablation.cells_at_work
import ablation.features
import ablation.inference
import ablation.loading
import ablation.workers  # noqa: F401
from ablation.making.arrow_folder import arrow_matrices, finish_folder, write_shard
from ablation.stopping import SIGNALS
from checkpointing import CRASH

PROJECT = Path(__file__).resolve().parent.parent.parent
SCRIPT = PROJECT / "visual_ablation_experiment.py"
ROWS, LABELS = 2100, 3  # three blocks of rows
LAYERS = [
    f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.{kind}.to_q.lora.{side}.weight"
    for block in range(2)
    for kind in ("attn1", "attn2")
    for side in ("down", "up")
]
FLAGS = (
    "--dataset ./loras --representations simple_stats stats info_theoretic --num-runs 3 --max-epochs 3 "
    "--hidden-dim 8 --batch-size 256 --cache-dir cache --device cpu --no-report"
).split()
OUTPUT = "visual-ablation-results/visual_ablation_loras"
CELLS = 6  # three representations of two layer sets
# Keys of results whose values are times, or hashes of files that hold times.
OF_TIME = (
    "made_on",
    "checksum",
    "predictions_hash",
    "inference_made_from",
    "inference_check",
    "first_stated",
    "other_plans",  # that were stated in the folder: of its history too
)
WAIT = 600.0  # seconds after which a process hangs


def make_data(folder: Path, seed: int = 0) -> None:
    """Write the data set `loras` to a folder, in place of another one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, LABELS, ROWS)
    columns: dict[str, Any] = {}
    for layer in LAYERS:
        weights = (
            rng.normal(size=(ROWS, *((1, 3) if ".down." in layer else (3, 1)))) * (1 + labels)[:, None, None]
        )
        columns[layer] = arrow_matrices(weights.astype(np.float32), "nested")
    features = Features(
        {layer: List(List(Value("float32"))) for layer in LAYERS} | {"category_label": Value("string")}
    )
    columns["category_label"] = pa.array([f"class {label}" for label in labels])
    made = folder / f".loras-{seed}"
    shutil.rmtree(made, ignore_errors=True)
    table = pa.table(columns, schema=features.arrow_schema)
    write_shard(made / "data-00000-of-00001.arrow", features.arrow_schema, [table])
    finish_folder(made, features, ["data-00000-of-00001.arrow"], f"endurance-{seed}")
    shutil.rmtree(folder / "loras", ignore_errors=True)
    os.replace(made, folder / "loras")


@dataclass
class Ended:
    """How a process ended: its status (negative: by that signal), what it printed, its seconds."""

    status: int
    text: str
    seconds: float


@dataclass
class Process:
    """The program, at work in a place."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)

    def wait(self) -> Ended:
        """Wait until it ends; one that hangs is killed after WAIT seconds, which is an error."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self.ended(status)
            if time.monotonic() - self.began > WAIT:
                os.kill(self.pid, 9)
                raise TimeoutError(f"the process of {self.log} hangs")
            time.sleep(0.002)

    def ended(self, status: int) -> Ended:
        """How it ended, of a status that the system gives."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""  # it was ended before that
        return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - self.began)

    def end_after(self, seconds: float, number: int) -> Ended:
        """Wait so long, send a signal if it still works, and wait until it ends."""
        while time.monotonic() - self.began < seconds:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self.ended(status)
            time.sleep(0.001)
        os.kill(self.pid, number)
        sent = time.monotonic()
        ended = self.wait()
        return Ended(ended.status, ended.text, time.monotonic() - sent)


@dataclass
class Trial:
    """A place with data, an output folder and a cache."""

    place: Path

    @classmethod
    def at(cls, place: Path, seed: int = 0) -> Trial:
        """A new place with its data."""
        place.mkdir(parents=True)
        make_data(place, seed)
        return cls(place)

    @property
    def output(self) -> Path:
        """The output folder."""
        return self.place / OUTPUT

    def start(self, *flags: str, crash: str = "", fresh: bool = False) -> Process:
        """Start the program; `crash` is the moment at which it kills itself (see `checkpointing`)."""
        log = self.place / f"log-{time.monotonic_ns()}"
        environment = {CRASH: crash, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        if fresh:
            with log.open("wb") as out:
                child = subprocess.Popen(
                    [sys.executable, str(SCRIPT), *FLAGS, *flags],
                    cwd=self.place,
                    stdout=out,
                    stderr=out,
                    env={**os.environ, **environment},
                    preexec_fn=default_signals,
                )
            child.returncode = 0  # waited for by its number
            return Process(child.pid, log)
        pid = os.fork()
        if pid == 0:
            self.become([*FLAGS, *flags], environment, log)
        return Process(pid, log)

    def become(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Run the program in this forked process, and end it."""
        status = 1
        try:
            default_signals()
            os.environ.update(environment)
            os.chdir(self.place)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            for stream in (1, 2):
                os.dup2(out, stream)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (stays open)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.argv = [str(SCRIPT), *arguments]
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def run(self, *flags: str, **how: Any) -> Ended:
        """Run the program to its end."""
        return self.start(*flags, **how).wait()

    # --- what must be true

    def finished(self) -> dict[str, tuple]:
        """The visible files of checkpoints/, with what changes if one is written again."""
        files = visible_files(self.output / "checkpoints")
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    def unreadable(self, *folders: Path) -> list[str]:
        """Visible files that a reader cannot read, in these folders (default: output folder and cache)."""
        wrong = []
        files = visible_files(*(folders or (self.output, self.place / "cache")))
        # A remembered identity is read for the very files that it was made of: in a copy of a folder, never.
        for path in (path for path in files if path.parent.name != "identities"):
            try:
                content_of(path)
            except Exception as error:  # whatever the reader says, it cannot read the file
                wrong.append(f"{path.relative_to(self.place)}: {error}")
        return wrong

    def foreign(self) -> list[str]:
        """Visible files in checkpoints/ that are no cell's."""
        names = {path.name for path in visible_files(self.output / "checkpoints")}
        sets = ("all_layers", "visual_only")
        cells = {f"{s}_{r}.json" for s in sets for r in ("simple_stats", "stats", "info_theoretic")}
        return sorted(names - cells)

    def leftovers(self) -> list[str]:
        """Hidden files that only an unfinished run may leave."""
        return [
            str(path.relative_to(self.place))
            for path in self.place.rglob(".*")
            if path.name.endswith(".tmp") or path.name == ".unfinished"
        ]

    def content(self) -> dict[str, Any]:
        """What output folder and cache hold, less times: equal for two experiments that are the same."""
        return self.results() | self.content_below(self.place / "cache")

    def results(self) -> dict[str, Any]:
        """What the output folder holds, less times. Damaged features that nobody reads stay in a cache."""
        return self.content_below(self.output)

    def content_below(self, folder: Path) -> dict[str, Any]:
        """What a folder's visible files hold, by their paths, less times."""
        skipped = ("manifest.json", "events.jsonl", "results.txt")
        return {
            str(path.relative_to(self.place)): content_of(path)
            for path in visible_files(folder)
            if path.name not in skipped and path.parent.name != "identities"
        }


def default_signals() -> None:
    """Let no signal be ignored. A shell ignores some in what it runs in the background."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def visible_files(*folders: Path) -> list[Path]:
    """Files below folders that `ls` would show, but for what was set aside."""
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and "set_aside" not in path.parts
    )


def content_of(path: Path) -> Any:
    """What a file holds, in a form that can be compared: times are left out."""
    if path.suffix == ".json":
        return without_time(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files}
    if path.suffix == ".safetensors":
        return {name: x.tobytes() for name, x in load_file(path).items()}
    return path.read_bytes()


def without_time(value: Any) -> Any:
    """A JSON value without seconds, and without hashes of files that hold them."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.startswith("training_time") and k not in OF_TIME}
        return {key: without_time(inner) for key, inner in kept.items()}
    return [without_time(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Trial]:
    """A trial whose experiment was run without a break, in a new folder that is removed at the end.

    What is imported now is there in every process that is forked later.
    """
    import torch

    torch.set_num_threads(1)
    for module in ("ablation.runs", "ablation.results", "ablation.inference", "ablation.verdict"):
        __import__(module)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        whole = Trial.at(folder / "whole")
        ended = whole.run()
        if ended.status:
            raise RuntimeError(f"the experiment itself fails:\n{ended.text}")
        yield whole
    finally:
        shutil.rmtree(folder, ignore_errors=True)
