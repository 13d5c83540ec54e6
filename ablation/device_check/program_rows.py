"""Table 3: the command line from end to end on the device, as processes on small generated collections."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from safetensors.numpy import load_file

from ablation.device_check.board import NOT_HERE, Board, Finding, judged
from ablation.device_check.sizes import CheckSizes
from ablation.endurance.trial import PROJECT, SCRIPT, content_of, visible_files
from ablation.making.arrow_folder import arrow_matrices, finish_folder, write_shard
from ablation.making.synthetic import SyntheticRecipe, write_synthetic

TABLE_CELLS = 18
KILLED_AFTER = 5  # finished cells
PROGRAM_SECONDS = 400  # after which a process hangs
LIMITS = (0.85, 0.7, 0.55)  # shares of the memory that a run takes without a limit
FEATURE_BOUND = 1e-5  # of a column's spread
PEAK_LINE = "most memory of tensors: "
SHARE_VARIABLE = "DEVICE_CHECK_SHARE"  # of the device's memory that the process below may take
# The program under a limit of the device's memory. Its last line has the most that its tensors took.
LIMITED = f"""
import os, sys, torch
import visual_ablation_experiment as experiment
from ablation.log import close_log

device = torch.device(sys.argv[1])
share = os.environ.get({SHARE_VARIABLE!r})
if share:
    torch.cuda.set_per_process_memory_fraction(float(share), device)
try:
    status = experiment.main(sys.argv[2:])
finally:
    close_log()
print({PEAK_LINE!r} + str(torch.cuda.max_memory_allocated(device)), flush=True)
sys.exit(status)
"""


@dataclass
class Result:
    """How a process of the program ended, and where its output lies."""

    status: int
    text: str
    seconds: float
    folder: Path  # of the output
    cache: Path

    def cells(self) -> dict[str, Any]:
        """The checkpoints, less times."""
        files = visible_files(self.folder / "checkpoints")
        return {path.stem: content_of(path) for path in files}

    def contents(self) -> dict[str, Any]:
        """Checkpoints and predictions, less times."""
        folders = (self.folder / "checkpoints", self.folder / "predictions")
        return {path.name: content_of(path) for path in visible_files(*folders)}

    def last_lines(self) -> str:
        """The end of the log, for a failed row."""
        return " / ".join(self.text.strip().splitlines()[-3:])


class Programs:
    """Processes of the program on one device, in a folder."""

    def __init__(self, place: Path, device: str, sizes: CheckSizes):
        self.place, self.sizes = place, sizes
        self.device = "cuda:0" if device == "cuda" else device  # limits of memory need its number
        self.flags = ["--num-runs", sizes.program_runs, "--max-epochs", sizes.program_epochs]
        self.flags += ["--hidden-dim", 32, "--batch-size", 16, "--no-report"]
        self.whole: Result | None = None

    @property
    def on_gpu(self) -> bool:
        """True if the device is a CUDA GPU."""
        return self.device.startswith("cuda")

    # --- processes

    def start(self, name: str, data: str, flags: list[Any], share: float | None = None) -> subprocess.Popen:
        """Start the program on a collection; output folder, cache and log are called `name`. With a `share`
        it is `LIMITED`: 0 for no limit.
        """
        folders = ["--output-dir", name, "--cache-dir", f"{name}-cache"]
        words = [str(word) for word in ("--dataset", f"./{data}", *folders, *flags)]
        command = [str(SCRIPT), *words] if share is None else ["-c", LIMITED, self.device, *words]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        own = {"PYTHONPATH": str(PROJECT), SHARE_VARIABLE: str(share or ""), "PYTHONUNBUFFERED": "1"}
        if not self.on_gpu:  # one thread a run: sums of several round otherwise
            own |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (self.place / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=self.place,
                env={**os.environ, **offline, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, process: subprocess.Popen, name: str, data: str, began: float) -> Result:
        """Wait until a process ends. One that hangs is killed, which is an error."""
        try:
            status = process.wait(PROGRAM_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        text = (self.place / f"{name}.log").read_text(errors="replace")
        folder = self.place / name / f"visual_ablation_{data}"
        return Result(status, text, time.monotonic() - began, folder, self.place / f"{name}-cache")

    def run(self, name: str, data: str, flags: list[Any], share: float | None = None) -> Result:
        """Run the program to its end."""
        began = time.monotonic()
        return self.wait(self.start(name, data, flags, share), name, data, began)

    # --- checks

    def all_cells(self) -> Finding:
        """The 18 cells without a break."""
        self.whole = self.run("whole", "loras", [*self.flags, "--device", self.device])
        count = len(self.whole.cells())
        is_right = self.whole.status == 0 and count == TABLE_CELLS
        shown = {"found": f"{count} cells, status {self.whole.status}, {self.whole.seconds:.0f} s"}
        if not is_right:
            shown["end of the log"] = self.whole.last_lines()
        return judged(is_right, shown, seconds=self.whole.seconds)

    def beside_whole(self, other: Result, words: str) -> Finding:
        """Checkpoints and predictions beside those of the run without a break."""
        if self.whole is None or self.whole.status:
            return judged(False, {"found": "there is no run without a break to compare with"})
        ours, truth = other.contents(), self.whole.contents()
        wrong = [name for name in sorted(ours.keys() | truth.keys()) if ours.get(name) != truth.get(name)]
        is_right = other.status == 0 and not wrong and len(other.cells()) == TABLE_CELLS
        shown = {"found": f"{words}; {len(truth) - len(wrong)} of {len(truth)} files equal"}
        if wrong:
            shown["different"] = ", ".join(wrong[:5])
        if other.status:
            shown["end of the log"] = other.last_lines()
        return judged(is_right, shown, different=wrong)

    def killed_and_resumed(self) -> Finding:
        """A process that is killed in the middle, and the same command again."""
        flags, began = [*self.flags, "--device", self.device], time.monotonic()
        process = self.start("killed", "loras", flags)
        checkpoints = self.place / "killed" / "visual_ablation_loras" / "checkpoints"
        while process.poll() is None and len(visible_files(checkpoints)) < KILLED_AFTER:
            if time.monotonic() - began > PROGRAM_SECONDS:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = len(visible_files(checkpoints))
        resumed = self.run("killed", "loras", flags)
        finding = self.beside_whole(resumed, f"killed after {finished} cells, then {resumed.status}")
        if not KILLED_AFTER <= finished < TABLE_CELLS:
            finding.verdict = judged(False, {}).verdict
        return finding

    def two_processes(self) -> Finding:
        """Two processes on the one device share the cells."""
        result = self.run("two", "loras", [*self.flags, "--devices", self.device, self.device])
        return self.beside_whole(result, f"{result.seconds:.0f} s")

    def without_room(
        self, name: str, data: str, flags: list[Any], words: str
    ) -> tuple[Result, Result, float]:
        """A run without a limit of memory, one with the first of LIMITS under which the log has `words`, and
        that limit. Raises RuntimeError if there is none.
        """
        flags = [*flags, "--device", self.device]
        free = self.run(f"{name}-free", data, flags, 0.0)
        found = re.search(f"{PEAK_LINE}(\\d+)", free.text)
        if free.status or not found:
            raise RuntimeError(f"without a limit: status {free.status}: {free.last_lines()}")
        total = torch.cuda.get_device_properties(self.device).total_memory
        told = re.compile(f"out of memory on {re.escape(self.device)}: .*{words}")
        ended = ""
        for limit in LIMITS:
            limited = self.run(f"{name}-{limit}", data, flags, limit * int(found[1]) / total)
            if limited.status == 0 and told.search(limited.text):
                return free, limited, limit
            ended += f"; at {limit}: status {limited.status}, {limited.last_lines()}"
        raise RuntimeError(f"no run ended well with the line '{told.pattern}'{ended}")

    def features_in_halves(self) -> Finding:
        """A block of features that does not fit the device is done in halves."""
        if not self.on_gpu:
            return Finding(NOT_HERE)
        write_large_layers(self.place / "large", self.sizes)
        flags: list[Any] = ["--representations", "simple_stats", "spectral", "frequency", "--num-runs", 1]
        flags += ["--hidden-dim", 8, "--max-epochs", 1, "--no-report"]
        free, limited, limit = self.without_room("features", "large", flags, "halves")
        worst, files = 0.0, sorted(path.relative_to(free.cache) for path in free.cache.rglob("*.safetensors"))
        for file in files:
            for key, truth in load_file(free.cache / file).items():
                if truth.dtype != np.float32 or truth.ndim != 2:
                    continue
                found, spread = load_file(limited.cache / file)[key], truth.astype(np.float64).std(0)
                allowed = FEATURE_BOUND * spread + 2e-7 * np.abs(truth).max(0) + 1e-30
                worst = max(worst, float((np.abs(found - truth) / allowed).max()))
        shown = {
            "found": f"at {limit:g} of the memory; {len(files)} files, {worst:.2g} of the allowed difference"
        }
        return judged(bool(files) and worst <= 1, shown)

    def pack_shrinks(self) -> Finding:
        """A pack of runs that does not fit the device is trained in parts."""
        if not self.on_gpu:
            return Finding(NOT_HERE)
        flags: list[Any] = [
            "--representations",
            "ensemble",
            "--layer-sets",
            "all_layers",
            "--trainer",
            "packed",
        ]
        flags += ["--num-runs", 10, "--max-epochs", self.sizes.program_epochs, "--no-report"]
        free, limited, limit = self.without_room("pack", "loras", flags, "runs")
        ours, truth = (
            np.array(json.loads(file.read_text())["test_acc_all_runs"])
            for result in (limited, free)
            for file in visible_files(result.folder / "checkpoints")
        )
        difference = float(ours.mean() - truth.mean())
        allowed = 2 * float(max(ours.std(), truth.std())) + 0.01
        shown = {
            "found": f"at {limit:g} of the memory; mean accuracy differs by {100 * difference:+.1f} points"
        }
        return judged(len(ours) == len(truth) and abs(difference) <= allowed, shown)


def write_large_layers(folder: Path, sizes: CheckSizes) -> None:
    """Write a collection of few large layers, whose block takes much of a device's memory."""
    rng = np.random.default_rng(0)
    layers = [
        (f"unet.down_blocks.0.attentions.0.transformer_blocks.0.{kind}.to_q.lora.{side}.weight", shape)
        for kind in ("attn1", "attn2")
        for side, shape in (("down", (sizes.memory_rank, 1280)), ("up", (1280, sizes.memory_rank)))
    ]
    types = {name: List(List(Value("float32"))) for name, _ in layers} | {"category_label": Value("string")}
    features = Features(types)
    columns: dict[str, Any] = {
        name: arrow_matrices(rng.standard_normal((sizes.memory_rows, *shape), dtype=np.float32), "nested")
        for name, shape in layers
    }
    columns["category_label"] = pa.array([f"class {row % 3}" for row in range(sizes.memory_rows)])
    table = pa.table(columns, schema=features.arrow_schema)
    write_shard(folder / "data-00000-of-00001.arrow", features.arrow_schema, [table])
    finish_folder(folder, features, ["data-00000-of-00001.arrow"], "device-check")


def check_program(board: Board, device: str, sizes: CheckSizes, place: Path) -> None:
    """Add the rows of the table; the collections and results are written to the folder `place`."""
    with contextlib.redirect_stdout(sys.stderr):  # it tells of its progress
        write_synthetic(SyntheticRecipe(rows=sizes.program_rows), place / "loras")
    programs = Programs(place, device, sizes)
    board.check(f"{TABLE_CELLS} cells", programs.all_cells)
    board.check("killed in the middle and resumed", programs.killed_and_resumed)
    board.check("two processes on the device", programs.two_processes)
    board.check("out of memory: features in halves", programs.features_in_halves)
    board.check("out of memory: fewer runs at once", programs.pack_shrinks)
