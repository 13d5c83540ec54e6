#!/usr/bin/env python3
"""Time each stage of the experiment beside the origin's way of doing it and beside what the machine can do at best.

    read       every layer's weights into memory of our own; the origin: through the torch formatter after a split;
               the limit: a plain copy of the same bytes
    features   nine representations of every layer, then six of every product, reading included; the origin: the formatter's tensors, and each
               representation on its own with torch.quantile, fft2, svdvals and histogram; the limit: the copy again
    train      runs of the 18 cells; the origin: one model after another from a DataLoader with torch's plain Adam and all
               cores, on all columns; the limit: the matrix products at the rate measured on the spot for large ones

Times are medians of interleaved runs: ours, the origin's, the limit's, and again. The origin's are measured on a part
(some layers, one run) and scaled to the whole. `--batch-sizes` and `--precisions` compare settings of training instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import training  # noqa: E402
from extraction import Features, extract_features  # noqa: E402
from lora_data import BLOCK_ROWS, LoraData, ReadAhead, load_lora_data  # noqa: E402
from settings import NINE, REPRESENTATION_GROUPS, REPRESENTATIONS, Cell, InputError, TrainingSettings, cells_of, parts_of  # noqa: E402
from visual_ablation_experiment import find_device  # noqa: E402

STAGES = ("read", "features", "train")
LAYER_SETS = ("all_layers", "visual_only")
PRECISIONS = ("float32", "bfloat16")
MARGIN = 0.01            # accuracies that differ by less are taken as equal
LEVEL = 0.05             # of each of the two one-sided tests
COPY_WEIGHTS = 2**28     # at most: 1 GiB, which no cache holds, is what the plain copy reads and writes
LEAST_SECONDS = 0.3
GEMM_SIDE = 2048         # of the square matrices whose product gives the machine's rate


# --- timing


@dataclass(frozen=True)
class Measured:
    """Seconds of the repeats, each already scaled to the whole."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({min(self.seconds):.3g}..{max(self.seconds):.3g})"


@dataclass(frozen=True)
class Row:
    stage: str
    what: str
    ours: Measured
    origin: Measured
    limit: Measured
    operations: int = 0   # of the matrix products

    def summary(self) -> dict:
        timed = {"ours": self.ours, "origin": self.origin, "limit": self.limit}
        return {
            "stage": self.stage, "what": self.what,
            **{f"{name}_seconds": one.median for name, one in timed.items()},
            **{f"{name}_all_seconds": one.seconds for name, one in timed.items()},
            "times_faster_than_origin": self.origin.median / self.ours.median,
            "times_slower_than_limit": self.ours.median / self.limit.median,
            "operations": self.operations,
        }


def interleaved(repeats: int, device: str, *functions: tuple[Callable[[], object], float], warm_up: int = 1) -> list[Measured]:
    """Time the functions in turn, `repeats` times, after `warm_up` turns that do not count; each with the factor to the whole.

    A short one is called again until a turn has lasted LEAST_SECONDS, and the mean is taken.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for repeat in range(-warm_up, repeats):
        for (function, factor), found in zip(functions, seconds, strict=True):
            calls, began, spent = 0, time.perf_counter(), 0.0
            while spent < LEAST_SECONDS:
                function()
                if device != "cpu":
                    torch.cuda.synchronize(device)
                calls, spent = calls + 1, time.perf_counter() - began
            if repeat >= 0:
                found.append(spent / calls * factor)
    return [Measured(found) for found in seconds]


def gemm_rate(dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """Floating-point operations a second of large square products on all cores, or on the GPU; the best of several."""
    a = torch.randn(GEMM_SIDE, GEMM_SIDE, device=device, dtype=dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(1 if device == "cpu" else 50):
            a @ a
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - began) / (1 if device == "cpu" else 50))
    return 2 * GEMM_SIDE**3 / best


# --- the origin's way, as the yardstick


def read_formatted(data: LoraData, layers: list[str]) -> list[Tensor]:
    """The torch formatter, after a random split, as the origin reads."""
    shuffled = data.dataset.select_columns(layers).train_test_split(test_size=0.2, seed=42)
    return [part[layer][:] for part in shuffled.values() for layer in layers]


def describe_one_by_one(w: Tensor) -> list[Tensor]:
    """The operations of the nine representations, each on its own and nothing shared: (n, rows, cols) -> parts of (n, k).

    What is timed is which operations run; the numbers are not used, and the cheap last steps (shares, ratios) are left out.
    """
    x, n = w.flatten(1), len(w)
    percents = torch.tensor([.01, .05, .1, .25, .5, .75, .9, .95, .99], device=w.device)

    def moments() -> list[Tensor]:
        d = x - x.mean(1, keepdim=True)
        return [(d**3).mean(1), (d**4).mean(1), x.std(1)]

    def singular() -> Tensor:
        return torch.linalg.svdvals(w)

    def magnitudes() -> list[Tensor]:
        found = torch.fft.fft2(w).abs().flatten(1)
        return [found.topk(min(10, found.shape[1])).values, found.mean(1), found.std(1), found.amax(1), (found**2).sum(1)]

    def histogram() -> list[Tensor]:
        return [torch.histc(row, 50) for row in x]

    def quantiles(which: Tensor) -> Tensor:
        return torch.quantile(x, which, dim=1)

    def norms() -> list[Tensor]:
        return [torch.linalg.matrix_norm(w, order) for order in ("fro", 1, math.inf)] + [singular()]

    def spread() -> list[Tensor]:
        return [quantiles(percents[1:8]), (x - x.mean(1, keepdim=True)).abs().mean(1), *moments()]

    simple = [x.norm(dim=1), x.mean(1), x.std(1), x.amax(1), x.amin(1)]
    once = [*simple, quantiles(percents), x.median(1).values, x.amin(1), x.amax(1), *moments()]
    five = lambda: [singular(), *norms(), *spread(), *magnitudes(), *histogram()]  # noqa: E731
    return [part.reshape(-1)[:n] for part in [*once, *five(), *five()]]   # the five stand alone and again in the ensemble


def train_from_loader(x_ND: Tensor, y_N: Tensor, split, num_classes: int, settings: TrainingSettings, seed: int) -> training.Run:
    """One run the usual way: DataLoader, torch's modules, plain Adam, losses read at every step."""
    torch.manual_seed(seed)
    width, layers = x_ND.shape[1], []
    for _ in range(training.HIDDEN_LAYERS):
        layers += [nn.Linear(width, settings.hidden_dim), nn.BatchNorm1d(settings.hidden_dim), nn.ReLU(), nn.Dropout(settings.dropout)]
        width = settings.hidden_dim
    model = nn.Sequential(*layers, nn.Linear(width, num_classes)).to(x_ND.device)
    loaders = {
        part: DataLoader(TensorDataset(x_ND[rows], y_N[rows]), settings.batch_size, shuffle=part == "train")
        for part, rows in (("train", split.train), ("val", split.val))
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    scheduler = training.plateau(optimizer)
    run, weights = training.Run(seed), {}
    while not training.has_stopped(run, settings):
        model.train()
        total = 0.0
        for rows, labels in loaders["train"]:
            if len(rows) < 2:
                continue
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(rows), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        model.eval()
        correct = 0
        with torch.no_grad():
            for rows, labels in loaders["val"]:
                correct += int((model(rows).argmax(1) == labels).sum())
        if training.record_epoch(run, total / len(split.train), correct, len(split.val), optimizer.param_groups[0]["lr"]):
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        scheduler.step(run.val_accuracy[-1])
    model.load_state_dict(weights)
    with torch.no_grad():
        run.predictions = {"test": model(x_ND[split.test]).argmax(1).cpu().numpy()}
    return run


# --- the stages


def time_reading(data: LoraData, arguments) -> list[Row]:
    layers = data.layers
    some, factor = part_for_origin(data, arguments.origin_layers)

    def ours() -> None:
        for start in range(0, data.num_rows, BLOCK_ROWS):
            for layer in layers:
                with data.buffer() as buffer:
                    data.read_layer(layer, start, min(start + BLOCK_ROWS, data.num_rows), buffer)

    def ahead() -> None:
        for start in range(0, data.num_rows, BLOCK_ROWS):
            for _ in ReadAhead(data, layers, start, min(start + BLOCK_ROWS, data.num_rows), torch.get_num_threads()):
                pass

    def one_by_one() -> None:
        read_formatted(data, some)

    size = sum(weights_of(data).values()) * 4 / 1e9
    timed = interleaved(arguments.repeats, data.device, (ahead if data.on_gpu else ours, 1), (one_by_one, factor), (copier(data), 1))
    return [Row("read", f"{len(layers)} layers, {size:.2f} GB", *timed)]


def weights_of(data: LoraData) -> dict[str, int]:
    return {layer: data.matrices[layer].rows * data.matrices[layer].cols * data.num_rows for layer in data.layers}


def copier(data: LoraData) -> Callable[[], None]:
    """Copies as many bytes as the data set has from memory to memory, a block of a layer at a time."""
    total, block = sum(weights_of(data).values()), data.block_weights
    source, target = (np.ones(min(total, COPY_WEIGHTS), np.float32) for _ in range(2))

    def copy() -> None:
        for start in range(0, total, block):
            size = min(block, total - start)
            place = start % max(len(source) - size, 1)
            np.copyto(target[place:place + size], source[place:place + size])

    return copy


def part_for_origin(data: LoraData, count: int) -> tuple[list[str], float]:
    """`count` layers at even distances, `down` and `up` in turn (they are sorted, so every second one is `up`), and by how much the whole is more."""
    layers, weights = data.layers, weights_of(data)
    count = min(count, len(layers))
    some = [layers[(i * len(layers) // count + i) % len(layers)] for i in range(count)]
    return some, sum(weights.values()) / sum(weights[layer] for layer in some)


def time_features(data: LoraData, arguments) -> list[Row]:
    some, factor = part_for_origin(data, arguments.origin_layers)

    def one_by_one() -> None:
        for layer in some:
            describe_one_by_one(torch.cat(read_formatted(data, [layer])).to(data.device))

    def ours(group: str) -> None:
        extract_features(data, widths_of([name for name in REPRESENTATION_GROUPS[group] if name != "ensemble"]))

    nine, product, origin, limit = interleaved(arguments.repeats, data.device, (lambda: ours("nine"), 1), (lambda: ours("product"), 1),
                                               (one_by_one, factor), (copier(data), 1))
    return [Row("features", f"nine of {len(data.layers)} layers", nine, origin, limit),
            Row("features", f"six of {len(data.modules)} products", product, origin, limit)]


def widths_of(names: list[str]) -> dict[str, int]:
    return {name: REPRESENTATIONS[name].width for name in names}


def inputs_of(data: LoraData, cells: list[Cell]) -> dict[Cell, Tensor]:
    """(N, D) of each cell, as the experiment hands it to the trainer."""
    names = [name for name in REPRESENTATIONS if any(name in parts_of(cell.representation) for cell in cells) and not REPRESENTATIONS[name].fitted]
    found = extract_features(data, widths_of(names))
    if found.errors:
        raise SystemExit(f"error: features failed: {found.errors}")
    features = Features(data, computed=found.features)
    return {cell: features.of(cell, [])[0] for cell in cells}


def time_training(data: LoraData, arguments) -> list[Row]:
    cells = cells_of(LAYER_SETS, NINE)
    inputs = inputs_of(data, cells)
    base = TrainingSettings(num_runs=arguments.runs, max_epochs=arguments.epochs, patience=arguments.epochs, batch_size=arguments.batch_size)
    num_classes = len(data.classes)
    y_N, train_rows = torch.from_numpy(data.labels).to(data.device), torch.from_numpy(data.split.train)
    moments = (torch.std_mean(x[train_rows].double(), dim=0, correction=0) for x in inputs.values())
    # constant columns stay, as zeros; not timed, because the origin does it once a cell
    standardised = [((x - mean) / (std + 1e-8)).float().to(data.device) for x, (std, mean) in zip(inputs.values(), moments, strict=True)]
    columns = [training.standardise(x, train_rows).shape[1] for x in inputs.values()]
    operations = sum(operations_of(D, num_classes, data.split, base) for D in columns) * arguments.runs * arguments.epochs

    def origin() -> None:
        for x_ND in standardised:
            train_from_loader(x_ND, y_N, data.split, num_classes, base, base.seed)

    def ours(precision: str) -> None:
        for x_ND in inputs.values():
            train(x_ND, data, dataclasses.replace(base, precision=precision))

    def products(precision: str) -> Measured:
        rate = gemm_rate(getattr(torch, precision), data.device)
        return Measured([operations / rate])

    one, *timed = interleaved(arguments.repeats, data.device, (origin, arguments.runs), *((lambda p=p: ours(p), 1) for p in PRECISIONS), warm_up=0)
    what = f"{len(cells)} cells x {arguments.runs} runs x {arguments.epochs} epochs"
    found = zip(PRECISIONS, timed, strict=True)
    return [Row("train", f"{what}, {precision}", ours, one, products(precision), operations) for precision, ours in found]


def operations_of(inputs: int, num_classes: int, split, settings: TrainingSettings) -> int:
    """Floating-point operations of the matrix products of one run's epoch: forward, two backward (one for the first layer), validation."""
    hidden = settings.hidden_dim
    first, rest = inputs * hidden, (training.HIDDEN_LAYERS - 1) * hidden**2 + hidden * num_classes
    return 2 * (len(split.train) * (2 * first + 3 * rest) + len(split.val) * (first + rest))


# --- settings of training against each other


def compare_batch_sizes(data: LoraData, arguments) -> list[dict]:
    """Whole runs at each batch size, all else the same."""
    found = []
    for cell, features in inputs_of(data, cells_of(["all_layers"], arguments.representations)).items():
        for batch_size in arguments.batch_sizes:
            settings = TrainingSettings(num_runs=arguments.runs, batch_size=batch_size, precision=arguments.precision)
            before, began = start_of_peak(data.device), time.perf_counter()
            trained = train(features, data, settings)
            seconds, accuracies = time.perf_counter() - began, test_accuracies(trained, data)
            found.append({
                "representation": cell.representation, "batch_size": batch_size,
                "epochs": statistics.mean(len(run.train_loss) for run in trained.runs), "seconds": seconds,
                "extra_memory_mb": (peak(data.device) - before) / 1e6,
                "test_accuracy": statistics.mean(accuracies), "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
            })
    return found


def train(features: Tensor, data: LoraData, settings: TrainingSettings) -> training.TrainedRuns:
    settings = training.resolve_training(settings, data.device)
    return training.train_runs(features, data.labels, data.split, len(data.classes), settings, data.device)


def start_of_peak(device: str) -> int:
    """Bytes in use (on a GPU: by tensors); the peak is measured from here."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")                        # Linux: the peak becomes what is in use now
    return memory_line("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device != "cpu" else memory_line("VmHWM")


def memory_line(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def test_accuracies(trained: training.TrainedRuns, data: LoraData) -> list[float]:
    truth = data.labels[data.split.test]
    return [float((run.predictions["test"] == truth).mean()) for run in trained.runs]


def compare_precisions(data: LoraData, arguments) -> list[dict]:
    """Is bfloat16 as accurate as float32? Whole runs of the same seeds with each, per representation."""
    found = []
    for cell, features in inputs_of(data, cells_of(["all_layers"], arguments.representations)).items():
        accuracy, seconds = {}, {}
        for precision in PRECISIONS:
            began = time.perf_counter()
            trained = train(features, data, TrainingSettings(num_runs=arguments.seeds, precision=precision))
            accuracy[precision], seconds[precision] = np.array(test_accuracies(trained, data)), time.perf_counter() - began
        found.append({
            "representation": cell.representation, **{precision: float(one.mean()) for precision, one in accuracy.items()},
            **equivalence(accuracy["bfloat16"] - accuracy["float32"]), "seconds": seconds,
        })
        print(precision_line(found[-1]), file=sys.stderr, flush=True)
    return found


def equivalence(differences: np.ndarray) -> dict:
    """Two one-sided t tests on the paired differences (R,) in accuracy.

    Equivalent if both reject a mean difference of MARGIN or more at LEVEL: just if the interval of level 1 - 2 LEVEL lies within it.
    """
    from scipy import stats  # in tests/requirements.txt

    mean, error = differences.mean(), stats.sem(differences)
    if error == 0:   # as when no prediction changed
        low = high = mean
        p = float(abs(mean) >= MARGIN)
    else:
        low, high = stats.t.interval(1 - 2 * LEVEL, len(differences) - 1, mean, error)
        p = max(stats.ttest_1samp(differences, side * -MARGIN, alternative=reject).pvalue for side, reject in ((1, "greater"), (-1, "less")))
    return {"seeds": len(differences), "difference": float(mean), "low": float(low), "high": float(high),
            "p": float(p), "equivalent": bool(p < LEVEL)}


# --- what is printed


def precision_line(one: dict) -> str:
    verdict = "equivalent" if one["equivalent"] else "not shown to be equivalent"
    return (f"| {one['representation']} | {100 * one['float32']:.2f} | {100 * one['bfloat16']:.2f} | {100 * one['difference']:+.2f} "
            f"| {100 * one['low']:+.2f} .. {100 * one['high']:+.2f} | {one['p']:.2g} | {verdict} |")


def stage_table(rows: list[Row]) -> str:
    lines = ["| stage | what | ours, s | origin's way, s | limit, s | faster than the origin | of the limit |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.stage} | {row.what} | {row.ours} | {row.origin} | {row.limit.median:.3g} "
                     f"| {row.origin.median / row.ours.median:.1f}x | {row.ours.median / row.limit.median:.2f}x |")
    for row in rows:
        if row.operations:
            reached, rate = (row.operations / one.median / 1e9 for one in (row.ours, row.limit))
            lines.append(f"| gemm | {row.what} | {reached:.0f} GFLOP/s | | {rate:.0f} GFLOP/s | | {100 * reached / rate:.0f} % |")
    return "\n".join(lines)


def batch_table(found: list[dict]) -> str:
    lines = ["| representation | batch size | epochs | seconds | memory, MB | test accuracy, % |", "|---|---|---|---|---|---|"]
    for one in found:
        lines.append(f"| {one['representation']} | {one['batch_size']} | {one['epochs']:.1f} | {one['seconds']:.1f} | {one['extra_memory_mb']:.0f} "
                     f"| {100 * one['test_accuracy']:.1f} ± {100 * one['test_accuracy_std']:.1f} |")
    return "\n".join(lines)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine(device: str, rates: dict[str, float]) -> str:
    gpu = "" if device == "cpu" else f"; {torch.cuda.get_device_name(device)}"
    measured = ", ".join(f"{precision} {rate / 1e9:.0f} GFLOP/s" for precision, rate in rates.items())
    return f"{processor()}, {torch.get_num_threads()} threads{gpu}; torch {torch.__version__}; large products: {measured}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="of the synthetic collection (published topology, 128 layers)")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--layout", choices=("nested", "array2d", "fixed"), default="nested")
    parser.add_argument("--dataset", help="measure on this data set instead of a synthetic one")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, interleaved")
    parser.add_argument("--runs", type=int, default=10, help="of each cell")
    parser.add_argument("--epochs", type=int, default=5, help="of each run in the stage train")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--origin-layers", type=int, default=4, help="layers that the origin's way is measured on")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="N", help="whole runs at each of these, instead of the stages")
    parser.add_argument("--representations", choices=tuple(REPRESENTATIONS), nargs="+", default=["ensemble"], metavar="NAME",
                        help="of all layers, for --batch-sizes and --precisions")
    parser.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), default="float32", help="for --batch-sizes")
    parser.add_argument("--precisions", action="store_true", help="bfloat16's accuracies against float32's, instead of the stages")
    parser.add_argument("--seeds", type=int, default=80, help="runs of each precision for --precisions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args(argv)
    for name in ("rows", "rank", "repeats", "runs", "epochs", "origin_layers", "seeds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if min(arguments.seeds, arguments.batch_size, *(arguments.batch_sizes or [2])) < 2:
        parser.error("--seeds, --batch-size and --batch-sizes are at least 2")
    try:
        return measure(arguments)
    except InputError as error:
        parser.error(str(error))


def measure(arguments) -> int:
    device = find_device(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.dataset:
            command = [sys.executable, ROOT / "scripts" / "make_synthetic_dataset.py", f"{folder}/loras", "--layout", arguments.layout,
                       "--rows", str(arguments.rows), "--rank", str(arguments.rank)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        data = load_lora_data(arguments.dataset or f"{folder}/loras", device)
        rates = {precision: gemm_rate(getattr(torch, precision), device) for precision in PRECISIONS}
        report = {"machine": machine(device, rates), "rates": rates, "rows": data.num_rows, "weights_per_row": data.card()["weights_per_row"]}
        if arguments.batch_sizes:
            report["batch_sizes"] = compare_batch_sizes(data, arguments)
            text = batch_table(report["batch_sizes"])
        elif arguments.precisions:
            report["precisions"] = compare_precisions(data, arguments)
            head = ["| representation | float32, % | bfloat16, % | difference | 90% interval | p | |", "|---|---|---|---|---|---|---|"]
            text = "\n".join([*head, *map(precision_line, report["precisions"])])
        else:
            stages = {"read": time_reading, "features": time_features, "train": time_training}
            rows = [row for name in (STAGES if arguments.stage == "all" else [arguments.stage]) for row in stages[name](data, arguments)]
            report["stages"] = [row.summary() for row in rows]
            text = stage_table(rows)
    print(json.dumps(report, indent=2) if arguments.json else f"{report['machine']}\n{data.num_rows} rows\n\n{text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
