"""A real weight-space data set made on a CPU: many LoRAs,
each fine-tuned on a few images of one handwritten digit.

A small diffusers UNet with cross-attention learns to denoise scikit-learn's 8x8 digits. Then LoRAs on to_q
and to_v of attn1 and attn2 are fine-tuned on it, a block of them at a time, each on images of one group: a
part of one digit's images. A LoRA depends on the recipe and its number; on the number of LoRAs and the block
size only in float32's rounding, and on the number of LoRAs not at all where it is a multiple of the block
size.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load, save
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor

from ablation.making import digits_training
from ablation.making.digits_training import (
    NUM_DIGITS,
    AdapterPlan,
    DigitsRecipe,
    make_unet,
    pretrain,
    train_block,
)
from ablation.making.progress import ProgressLine, say
from checkpointing import hash_of, write_bytes

# --- the images


def read_images() -> tuple[Tensor, np.ndarray]:
    """scikit-learn's digits as (1797, 1, 8, 8) float32 in [-1, 1], and the digit of each."""
    digits = load_digits()
    return torch.from_numpy(digits.images / 8 - 1).float()[:, None], digits.target


def divide_images(images: Tensor, digits: np.ndarray, recipe: DigitsRecipe) -> np.ndarray:
    """(1797,) group of each image within its digit; no image is in two groups.

    `random` groups are of equal size, to within one image; `clusters` are k-means clusters of the pixels.
    """
    group_of, rng = np.empty(len(digits), dtype=np.int64), np.random.default_rng([recipe.seed, 3])
    for digit in range(NUM_DIGITS):
        members = np.flatnonzero(digits == digit)
        if recipe.grouping == "random":
            group_of[rng.permutation(members)] = np.arange(len(members)) % recipe.groups
        else:
            clusters = KMeans(recipe.groups, n_init=10, random_state=recipe.seed)
            group_of[members] = clusters.fit_predict(images[members].flatten(1).numpy())
    return group_of


def plan_loras(count: int, recipe: DigitsRecipe, digits: np.ndarray, groups: np.ndarray) -> list[AdapterPlan]:
    """The first `count` LoRAs, digits and groups in turn, so that any count is as balanced as possible."""
    plans = []
    for number in range(count):
        rng = np.random.default_rng([recipe.seed, 1, number])
        digit, group = number % NUM_DIGITS, number // NUM_DIGITS % recipe.groups
        members = np.flatnonzero((digits == digit) & (groups == group))
        num_images = int(rng.choice(recipe.images))
        if num_images > len(members):
            raise SystemExit(
                f"error: group {group} of digit {digit} has {len(members)} images, {num_images} are asked "
                "for: give fewer --images or --groups"
            )
        chosen = np.sort(rng.choice(members, num_images, replace=False))
        plans.append(
            AdapterPlan(digit, group, chosen, int(rng.choice(recipe.steps)), int(rng.integers(2**31)))
        )
    return plans


# --- the file


def to_table(
    plans: list[AdapterPlan], weights: dict[str, Tensor], losses: Tensor, rank: int, order: np.ndarray
) -> pa.Table:
    """Rows in `order`: a column of nested float32 lists for each layer, and what is known of each LoRA.

    Weights are rounded to float16, the precision that most LoRA files are saved in.
    """
    columns = {}
    for column, stacked in sorted(weights.items()):
        n, rows, cols = stacked.shape
        flat = pa.array(stacked[order].half().float().numpy().reshape(-1))
        inner = pa.ListArray.from_arrays(np.arange(n * rows + 1, dtype=np.int32) * cols, flat)
        columns[column] = pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * rows, inner)
    ordered = [plans[i] for i in order]
    columns |= {
        "category_label": [plan.category_label for plan in ordered],
        "category_name": [plan.category_name for plan in ordered],
        "num_images": [len(plan.images) for plan in ordered],
        "images": [plan.images.tolist() for plan in ordered],
        "max_train_steps": [plan.steps for plan in ordered],
        "step_loss": losses[order].tolist(),
        "seed": [plan.seed for plan in ordered],
        "rank": [rank] * len(ordered),
    }
    return pa.table(columns)


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as Parquet. Noise does not compress,
    but its exponents do once the four bytes of a float lie apart.
    """
    sink = io.BytesIO()
    floats = [
        f"{field.name}.list.element.list.element"
        for field in table.schema
        if field.type == pa.list_(pa.list_(pa.float32()))
    ]
    strings = ["category_label", "category_name"]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=19,
        use_dictionary=strings,
        write_statistics=False,
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
    )
    return sink.getvalue()


# --- all of it


def build_digits(output: Path, count: int, recipe: DigitsRecipe, block_size: int) -> None:
    """Train `count` LoRAs and write them to `output`;
    finished parts lie in a hidden folder beside it until then.
    """
    images, digits = read_images()
    plans = plan_loras(count, recipe, digits, divide_images(images, digits, recipe))
    packages = map(version, ("torch", "diffusers", "scikit-learn"))
    sources = [Path(file).read_text() for file in (__file__, digits_training.__file__)]
    made_with = [dataclasses.asdict(recipe), count, block_size, *sources, *packages]
    # Another recipe never meets these parts.
    parts = output.with_name(f".{output.name}.{hash_of(made_with)[:16]}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    unet = pretrained_unet(parts / "unet.safetensors", recipe, images, digits)
    blocks = [plans[start : start + block_size] for start in range(0, count, block_size)]
    weights, losses = train_blocks(unet, images, blocks, recipe, parts)
    for name, values in {**weights, "step_loss": losses}.items():
        if not values.isfinite().all():
            raise SystemExit(f"error: {name} has values that are not finite: lower --learning-rate")
    order = np.random.default_rng([recipe.seed, 2]).permutation(count)
    content = parquet_bytes(to_table(plans, weights, losses, recipe.rank, order))
    write_bytes(output, content)
    shutil.rmtree(parts)
    say(f"{output}: {count} LoRAs, {len(weights)} layers, {len(content) / 1e6:.2f} MB")


def pretrained_unet(
    path: Path, recipe: DigitsRecipe, images: Tensor, digits: np.ndarray
) -> UNet2DConditionModel:
    """The UNet that the LoRAs change, frozen; from the file of an earlier run if there is one."""
    torch.manual_seed(recipe.seed)
    unet = make_unet()
    if not path.exists():
        count = sum(p.numel() for p in unet.parameters())
        say(f"Pre-training a UNet of {count:,} weights on {len(images)} images")
        say(f"Loss of the last tenth of its steps: {pretrain(unet, recipe, images, digits):.4f}")
        write_bytes(path, save(unet.state_dict()))
    unet.load_state_dict(load(path.read_bytes()))
    return unet.requires_grad_(False).eval()


def train_blocks(
    unet: UNet2DConditionModel,
    images: Tensor,
    blocks: list[list[AdapterPlan]],
    recipe: DigitsRecipe,
    parts: Path,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train the blocks whose file is not there yet.
    Returns {column: (n, rows, cols)} and last losses (n,) of all.
    """
    files = [parts / f"block-{number:05}.safetensors" for number in range(len(blocks))]
    to_do = [(file, block) for file, block in zip(files, blocks, strict=True) if not file.exists()]
    count = sum(map(len, blocks))
    say(
        f"{count} LoRAs of rank {recipe.rank}, prompt {recipe.prompt}: {len(blocks)} blocks, "
        f"{len(blocks) - len(to_do)} of them there already"
    )
    progress = ProgressLine(sum(plan.steps for _, block in to_do for plan in block), "steps")
    for file, block in to_do:
        weights, losses = train_block(unet, images, block, recipe, progress.advance)
        write_bytes(file, save({**weights, "step_loss": losses}))
    if to_do:
        progress.line()
    loaded = [load(file.read_bytes()) for file in files]
    joined = {name: torch.cat([block[name] for block in loaded]) for name in loaded[0]}
    return joined, joined.pop("step_loss")
