"""Folders of adapter files -> a data set: find the files, plan, write the shards, say what was done."""

from __future__ import annotations

import collections
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablation.fields import InputError
from ablation.layers import Layers
from ablation.log import visible
from ablation.making.arrow_folder import finish_folder
from ablation.making.duplicates import duplicate_files
from ablation.making.findings import findings_of, say_findings
from ablation.making.headers import chosen_columns
from ablation.making.inputs import Inputs, find_inputs
from ablation.making.labels import Labels, label_source
from ablation.making.plan import (
    BUILD_VERSION,
    BuildOptions,
    BuildPlan,
    describe_bad,
    make_plan,
    refuse_bad,
    refused_kinds,
)
from ablation.making.progress import say
from ablation.making.shards import Shard, ShardWriter
from checkpointing import Held, Refused, holding, write_json


@dataclass(frozen=True)
class BuildRequest:
    """What is built from what. `label_from` is folder, metadata, civitai, csv, or None to choose by
    what is there.
    """

    folders: list[Path]
    output: Path
    label_from: str | None = None
    labels: Path | None = None
    label_field: str = ""
    header_columns: tuple[str, ...] = ()  # names of fields in the files' headers, or `all`
    overwrite: bool = False
    options: BuildOptions = field(default_factory=BuildOptions)


def run_build(request: BuildRequest) -> int:
    """Build the data set of a request. Returns the exit status; errors are one line on stderr."""
    work = request.output.parent / f".{request.output.name}.building"
    try:
        with holding(work):
            try:
                build_dataset(request, work)
            finally:
                if not (work / "set").exists():  # nothing to resume from
                    shutil.rmtree(work)
    except (InputError, Refused) as error:
        print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
        return 2
    except Held:
        message = f"another process builds {request.output}: wait for it"
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 3
    return 0


def build_dataset(request: BuildRequest, work: Path) -> None:
    """Build the data set in the folder `work`, and put it in its place. Raises InputError."""
    began = time.monotonic()
    output, options = request.output, request.options
    if output.exists() and not (output / "build.json").is_file():
        raise InputError(f"{output} exists and was not built by this program: choose another --output")
    inputs = find_inputs(request.folders, options.pattern, options.pickles == "read")
    columns = chosen_columns(request.header_columns)
    labels = label_source(request.label_from, request.labels, request.label_field, inputs, columns)
    plan = make_plan(options, inputs, labels)
    if output.exists() and not request.overwrite:
        say_already_built(request, plan)
        return
    say(
        f"{len(plan.kept)} files to read, {len(plan.layout.columns)} layers of rank {plan.rank}, "
        f"{plan.row_bytes * len(plan.kept) / 1e9:.2f} GB of weights; labels from {labels.kind}"
    )
    duplicates = duplicate_files({name: inputs.path(name) for name in plan.kept})
    writer = ShardWriter(options, plan, labels, work)
    writer.prepare()
    shards = list(writer.write())
    summary = summarise(request, plan, labels, shards)
    left_out = {name for name, _ in summary["bad"]}
    rows = [name for name in plan.kept if name not in left_out]
    summary |= findings_of(labels, rows, duplicates)
    names = [shard.name for shard in shards if shard.rows]
    finish_folder(work / "set", plan.features, names, plan.fingerprint)
    write_json(work / "set" / "build.json", summary, indent=2)
    if output.exists():
        shutil.rmtree(output)
    os.replace(work / "set", output)
    print_summary(request, plan, inputs, summary, time.monotonic() - began)


def say_already_built(request: BuildRequest, plan: BuildPlan) -> None:
    """Say that the output is there already. Raises InputError if it was built from other files or options."""
    made = json.loads((request.output / "build.json").read_text(encoding="utf-8"))
    if made["fingerprint"] != plan.fingerprint:
        raise InputError(
            f"{request.output} exists, built from other files or with other options: choose another "
            "--output, or --overwrite"
        )
    refuse_bad(request.options.on_bad, made["bad"])
    say(f"{request.output} is already built from these files with these options: {made['rows']} rows")


def summarise(request: BuildRequest, plan: BuildPlan, labels: Labels, shards: list[Shard]) -> dict[str, Any]:
    """The content of build.json. Raises InputError if no file became a row."""
    bad = plan.bad + [(name, reason) for shard in shards for name, reason in shard.bad]
    rows = sum(shard.rows for shard in shards)
    if not rows:
        raise InputError(f"no file is left: {describe_bad(bad)}")
    files = labels.inputs.file_count
    if rows + len(bad) + plan.other_rank != files:
        raise RuntimeError(
            f"{files} files became {rows} rows and {len(bad)} bad ones: this is a defect of the builder"
        )
    return {
        "fingerprint": plan.fingerprint,
        "version": BUILD_VERSION,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "rows": rows,
        "files": files,
        "bad": bad,
        "of_another_rank": plan.other_rank,
        "rank": plan.rank,
        "styles": added_up(shard.styles for shard in shards),
        "kinds": added_up(shard.kinds for shard in shards),
        "refused_kinds": refused_kinds(bad),
        "rank_error": {
            "mean": sum(shard.sum_of_errors for shard in shards) / rows,
            "largest": max(shard.largest_error for shard in shards),
        },
        "labels_from": labels.kind,
        "rows_per_class": added_up(shard.classes for shard in shards),
        "alpha": request.options.alpha,
        "rows_scaled": sum(shard.scaled for shard in shards),
        "modules": list(plan.layout.modules),
        "flattened": list(plan.layout.flattened),
        "nulls": labels.nulls(),
    }


def added_up(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of the numbers of each name."""
    sums: collections.Counter[str] = collections.Counter()
    for some in counts:
        sums.update(some)
    return dict(sums)


# --- what is said


def print_summary(
    request: BuildRequest, plan: BuildPlan, inputs: Inputs, summary: dict[str, Any], seconds: float
) -> None:
    """Say what was built, what was left out, and the command that reads it."""
    layers = Layers([column for column, _, _ in plan.columns], {})
    counts = ", ".join(f"{count} {word}" for word, count in layers.count_words().items())
    rows, files = summary["rows"], summary["files"]
    say(
        f"\nWrote {request.output}: {rows} rows, {len(summary['rows_per_class'])} classes, "
        f"{len(plan.layout.columns)} layers ({counts}), rank {plan.rank}, float32, "
        f"{plan.row_bytes * rows / 1e9:.2f} GB, in {seconds:.1f}s ({files / max(seconds, 1e-9):.1f} files/s)"
    )
    passed = f"; {inputs.passed_over} hidden or trainer-state files passed over" if inputs.passed_over else ""
    say(
        f"Files:   {files} found = {rows} written + {len(summary['bad'])} bad + {plan.other_rank} of another "
        "rank" + passed
    )
    say(f"Model:   {layers.found.title}")
    say("Styles:  " + ", ".join(f"{count} {style}" for style, count in sorted(summary["styles"].items())))
    say("Kinds:   " + ", ".join(f"{count} {kind}" for kind, count in sorted(summary["kinds"].items())))
    say_approximations(request, plan, summary)
    scaled = f"it is not 1 in {summary['rows_scaled']} files"
    scale = {
        "apply": f"applied to `up`; {scaled}",
        "record": f"recorded in lora_scale, not applied; {scaled}",
        "ignore": "ignored, nothing is scaled",
    }
    say(f"Scale:   alpha / rank is {scale[request.options.alpha]}")
    if plan.layout.flattened:
        say(
            f"Flat:    {len(plan.layout.flattened)} columns hold convolutions, flattened from (r, in, "
            "height, width) to (r, in * height * width)"
        )
    for column, count in summary["nulls"].items():
        say(f"Nulls:   {count} files have no '{column}'")
    say_findings(summary, rows, plan.others)
    if summary["bad"]:
        say(f"WARNING: left out, {describe_bad(summary['bad'])}")
    column = "" if "category_label" in plan.others else f" --label-column {request.label_field}"
    path = shlex.quote(as_path(request.output))
    say(f"Next:    python3 visual_ablation_experiment.py --dataset {path}{column}")


def say_approximations(request: BuildRequest, plan: BuildPlan, summary: dict[str, Any]) -> None:
    """Say what of the files the rows do not have, or have otherwise."""
    if plan.magnitudes:
        count = sum(files for kind, files in summary["kinds"].items() if kind.startswith("DoRA"))
        say(
            f"DoRA:    {count} files: up @ down is the change of direction alone, because the magnitude "
            f"needs the base model; the {len(plan.magnitudes)} magnitudes are columns, of no layer set"
        )
    if request.options.split_qkv and not any(module.part for module in plan.layout.modules.values()):
        say("Split:   no modules of the first code of Flux or SD 3 alone: nothing was split or renamed")
    if request.options.pads:
        say(
            "Rank:    padded with zeros: exact for what looks at up @ down; down and up alone have zeros "
            "that their file has not"
        )
    if request.options.svd_rank:
        error = summary["rank_error"]
        say(
            f"Rank:    best approximation of up @ down; its relative error is {error['mean']:.2g} on "
            f"average, at most {error['largest']:.2g} (column rank_error)"
        )


def as_path(output: Path) -> str:
    """The output spelled so that it cannot be taken for an alias or a name on the Hub."""
    return str(output) if output.is_absolute() or output.parts[:1] == ("..",) else f"./{output}"
