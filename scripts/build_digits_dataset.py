#!/usr/bin/env python3
"""Make a real weight-space data set on a CPU: many LoRAs, each fine-tuned on a few images of one handwritten digit.

A small diffusers UNet with cross-attention learns to denoise scikit-learn's 8x8 digits. Then LoRAs on to_q and to_v of
attn1 and attn2 are fine-tuned on it, a block of them at a time, each on images of one group: a cluster of one digit's
images. With --prompt neutral all of them see one and the same context, so the text path never meets the class; with
--prompt named each sees its digit's own, as in the published sets. The two share seeds, images and the UNet.

What a LoRA is depends on --seed, its number and the options of training; on --loras and --block-size only in float32's
rounding, and on --loras not at all where it is a multiple of --block-size. A run that was stopped goes on from its last
finished block when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load, save
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from progress import Progress  # noqa: E402

from checkpointing import hash_of, write_bytes  # noqa: E402

NUM_CLASSES = 10
NEUTRAL = NUM_CLASSES              # the context of no class, after those of the ten
CONTEXT_TOKENS, CONTEXT_WIDTH = 4, 32   # several tokens: with one, attention has nothing to choose and to_q learns nothing
NOISE_LEVELS = 1000
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8   # torch's defaults


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights of one LoRA depend on, besides its number."""

    prompt: str = "neutral"           # neutral: one context for all; named: the digit's own
    rank: int = 2
    steps: tuple[int, ...] = (27, 30, 33)   # a LoRA's number of steps is one of these
    images: tuple[int, ...] = (6, 8, 10)    # and so is its number of images
    groups: int = 2                   # k-means clusters of each digit's images
    learning_rate: float = 1e-2
    batch_size: int = 8
    pretrain_steps: int = 150
    pretrain_batch: int = 32
    seed: int = 0


class Plan(NamedTuple):
    """One LoRA before it is trained."""

    digit: int
    group: int
    images: np.ndarray   # which of the 1,797
    steps: int
    seed: int            # of its initial weights and batches

    @property
    def category_label(self) -> str:
        return f"digit_{self.digit}"

    @property
    def category_name(self) -> str:
        return f"digit_{self.digit}/{self.group}"


# --- the images


def read_images() -> tuple[Tensor, np.ndarray]:
    """scikit-learn's digits as (1797, 1, 8, 8) float32 in [-1, 1], and the digit of each."""
    digits = load_digits()
    return torch.from_numpy(digits.images / 8 - 1).float()[:, None], digits.target


def cluster_images(images: Tensor, digits: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """(1797,) group of each image within its digit: k-means on the pixels, so that no image is in two groups."""
    found = np.empty(len(digits), dtype=np.int64)
    for digit in range(NUM_CLASSES):
        members = digits == digit
        found[members] = KMeans(groups, n_init=10, random_state=seed).fit_predict(images[members].flatten(1).numpy())
    return found


def plan_loras(count: int, recipe: Recipe, digits: np.ndarray, groups: np.ndarray) -> list[Plan]:
    """The first `count` LoRAs: digits and groups in turn, so that any count is as balanced as it can be."""
    plans = []
    for number in range(count):
        rng = np.random.default_rng([recipe.seed, 1, number])
        digit, group = number % NUM_CLASSES, number // NUM_CLASSES % recipe.groups
        members = np.flatnonzero((digits == digit) & (groups == group))
        wanted = int(rng.choice(recipe.images))
        if wanted > len(members):
            raise SystemExit(f"error: group {group} of digit {digit} has {len(members)} images, {wanted} are asked for: "
                             "give fewer --images or --groups")
        chosen = np.sort(rng.choice(members, wanted, replace=False))
        plans.append(Plan(digit, group, chosen, int(rng.choice(recipe.steps)), int(rng.integers(2**31))))
    return plans


# --- the network


def make_unet() -> UNet2DConditionModel:
    """About a million weights; seven transformer blocks, hence 28 modules that carry a LoRA."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=CONTEXT_WIDTH, attention_head_dim=4, norm_num_groups=8,
    )
    unet.set_attn_processor(AttnProcessor())   # plain attention: the fused kernel has no rule for vmap
    return unet


def make_contexts() -> Tensor:
    """(11, tokens, width): what the text encoder would say for each digit, and for none. Random and fixed, all of like size."""
    return torch.randn(NUM_CLASSES + 1, CONTEXT_TOKENS, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(7))


def signal_shares() -> Tensor:
    """(levels,) share of the image's variance that is left at each noise level; a cosine schedule."""
    return DDPMScheduler(num_train_timesteps=NOISE_LEVELS, beta_schedule="squaredcos_cap_v2").alphas_cumprod


def add_noise(images: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
    """images and noise (..., 1, 8, 8), shares (...)"""
    shares = shares[..., None, None, None]
    return shares.sqrt() * images + (1 - shares).sqrt() * noise


def pretrain(unet: UNet2DConditionModel, recipe: Recipe, images: Tensor, digits: np.ndarray) -> float:
    """Teach it to predict the noise in all digits, half of the time with the digit's context and half with the neutral one.

    Both kinds of context mean something to it afterwards, whichever the LoRAs are then given. Returns the mean loss of
    the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    contexts, shares, labels = make_contexts(), signal_shares(), torch.from_numpy(digits)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(recipe.pretrain_steps, 2))
    losses = []
    progress = Progress(recipe.pretrain_steps, "pre-training steps")
    for _ in range(recipe.pretrain_steps):
        batch = torch.randint(len(images), (recipe.pretrain_batch,), generator=generator)
        named = torch.rand(recipe.pretrain_batch, generator=generator) < 0.5
        context = contexts[torch.where(named, labels[batch], NEUTRAL)]
        level = torch.randint(NOISE_LEVELS, (recipe.pretrain_batch,), generator=generator)
        noise = torch.randn(recipe.pretrain_batch, 1, 8, 8, generator=generator)
        predicted = unet(add_noise(images[batch], noise, shares[level]), level, context).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.advance()
    progress.line()
    return float(np.mean(losses[-max(1, len(losses) // 10):]))


# --- the LoRAs


def lora_modules(unet: UNet2DConditionModel) -> list[str]:
    """Names of the linear layers that get a LoRA, sorted: to_q and to_v of self- and cross-attention."""
    return sorted(name for name, _ in unet.named_modules() if name.endswith(("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")))


def column_of(module: str, side: str) -> str:
    """The name under which diffusers saves it."""
    return f"unet.{module}.lora.{side}.weight"


class Draws(NamedTuple):
    """All that is random in one LoRA's training; S its steps, B the batch."""

    loras: dict[str, Tensor]   # initial weights by column: down (rank, in), up (out, rank)
    batches: Tensor            # (S, B) which of its images
    levels: Tensor             # (S, B) noise levels
    noise: Tensor              # (S, B, 1, 8, 8)


def draw(plan: Plan, unet: UNet2DConditionModel, recipe: Recipe) -> Draws:
    """`down` is Gaussian with std 1/rank and `up` is zero, as peft's init_lora_weights="gaussian".

    A batch has every image once before any comes twice, and its noise levels are spread evenly. Levels and noise are one
    sequence for all LoRAs. Both so that LoRAs differ by their images and initial weights and not by luck.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    loras = {}
    for module in lora_modules(unet):
        out_features, in_features = unet.get_submodule(module).weight.shape
        loras[column_of(module, "down")] = torch.randn(recipe.rank, in_features, generator=generator) / recipe.rank
        loras[column_of(module, "up")] = torch.zeros(out_features, recipe.rank)
    common = torch.Generator().manual_seed(recipe.seed)
    size = (max(plan.steps, *recipe.steps), recipe.batch_size)
    levels = (torch.arange(recipe.batch_size) + torch.rand(size, generator=common)) * (NOISE_LEVELS / recipe.batch_size)
    return Draws(
        loras,
        torch.stack([shuffled(len(plan.images), recipe.batch_size, generator) for _ in range(plan.steps)]),
        levels.long().clamp_max(NOISE_LEVELS - 1)[:plan.steps],          # rounding may reach the next one
        torch.randn(*size, 1, 8, 8, generator=common)[:plan.steps],
    )


def shuffled(items: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers below `items` in random order, all of them once before any comes again."""
    return torch.cat([torch.randperm(items, generator=generator) for _ in range(-(-count // items))])[:count]


def train_block(unet: UNet2DConditionModel, images: Tensor, plans: list[Plan], recipe: Recipe, on_steps=lambda made: None):
    """Fine-tune several LoRAs at once with Adam: {column: (n, rows, cols)} and the loss of each one's last step (n,).

    They share the frozen weights and nothing else. One that has made its steps is set aside and the others go on.
    `unet`'s dtype is the one that is computed in. `on_steps` is told how many LoRAs have just made a step.
    """
    dtype = next(unet.parameters()).dtype
    frozen = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    modules, shares = lora_modules(unet), signal_shares().to(dtype)

    def loss(one: dict[str, Tensor], noisy: Tensor, level: Tensor, noise: Tensor, context: Tensor) -> Tensor:
        changed = {
            f"{module}.weight": frozen[f"{module}.weight"] + one[column_of(module, "up")] @ one[column_of(module, "down")] for module in modules
        }
        context = context.expand(len(noisy), *context.shape)
        predicted = functional_call(unet, frozen | changed, (noisy, level, context)).sample
        return torch.nn.functional.mse_loss(predicted, noise)

    gradients_and_losses = vmap(grad_and_value(loss))
    drawn = [draw(plan, unet, recipe) for plan in plans]
    loras = {column: torch.stack([one.loras[column] for one in drawn]).to(dtype) for column in drawn[0].loras}
    mean, square = ({column: torch.zeros_like(weights) for column, weights in loras.items()} for _ in range(2))   # Adam's moments
    contexts = make_contexts().to(dtype)[[plan.digit if recipe.prompt == "named" else NEUTRAL for plan in plans]]   # (n, tokens, width)
    trained = {column: torch.empty_like(weights) for column, weights in loras.items()}
    last_losses = torch.empty(len(plans), dtype=dtype)
    active = list(range(len(plans)))                     # which LoRAs the n' rows of loras, mean, square and contexts are
    for step in range(max(plan.steps for plan in plans)):
        batch = torch.stack([images[plans[i].images[drawn[i].batches[step].numpy()]] for i in active]).to(dtype)   # (n', B, 1, 8, 8)
        levels = torch.stack([drawn[i].levels[step] for i in active])                                              # (n', B)
        noise = torch.stack([drawn[i].noise[step] for i in active]).to(dtype)                                      # (n', B, 1, 8, 8)
        gradients, losses = gradients_and_losses(loras, add_noise(batch, noise, shares[levels]), levels, noise, contexts)
        for column, gradient in gradients.items():
            mean[column].lerp_(gradient, 1 - ADAM_BETAS[0])
            square[column].lerp_(gradient.square(), 1 - ADAM_BETAS[1])
            size = (square[column] / (1 - ADAM_BETAS[1] ** (step + 1))).sqrt() + ADAM_EPSILON
            loras[column] = loras[column] - recipe.learning_rate / (1 - ADAM_BETAS[0] ** (step + 1)) * mean[column] / size
        on_steps(len(active))
        going = [place for place, i in enumerate(active) if plans[i].steps > step + 1]
        if len(going) < len(active):
            done = [place for place, i in enumerate(active) if plans[i].steps == step + 1]
            which = [active[place] for place in done]
            last_losses[which] = losses[done]
            for column, weights in loras.items():
                trained[column][which] = weights[done]
            loras, mean, square = ({column: values[going] for column, values in stack.items()} for stack in (loras, mean, square))
            contexts, active = contexts[going], [active[place] for place in going]
    return trained, last_losses


# --- the file


def to_table(plans: list[Plan], weights: dict[str, Tensor], losses: Tensor, rank: int, order: np.ndarray) -> pa.Table:
    """Rows in `order`: a column a layer, nested float32 lists, and what is known of each LoRA."""
    columns = {}
    for column, stacked in sorted(weights.items()):
        n, rows, cols = stacked.shape
        flat = pa.array(stacked[order].numpy().reshape(-1))
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
    """Noise does not compress, but the exponents in it do, once the four bytes of a float lie apart."""
    sink = io.BytesIO()
    floats = [f"{field.name}.list.element.list.element" for field in table.schema if field.type == pa.list_(pa.list_(pa.float32()))]
    strings = ["category_label", "category_name"]
    pq.write_table(table, sink, compression="zstd", compression_level=19, use_dictionary=strings, write_statistics=False,
                   column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT"))
    return sink.getvalue()


# --- the program


def build(output: Path, count: int, recipe: Recipe, block_size: int) -> None:
    """Train `count` LoRAs and write them to `output`; finished parts lie in a hidden folder beside it until then."""
    images, digits = read_images()
    plans = plan_loras(count, recipe, digits, cluster_images(images, digits, recipe.groups, recipe.seed))
    made_with = [dataclasses.asdict(recipe), count, block_size, Path(__file__).read_text(), *map(version, ("torch", "diffusers", "scikit-learn"))]
    parts = output.with_name(f".{output.name}.{hash_of(made_with)[:16]}.parts")   # another recipe never meets these parts
    parts.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(recipe.seed)
    unet = make_unet()
    pretrained = parts / "unet.safetensors"
    if not pretrained.exists():
        print(f"Pre-training a UNet of {sum(p.numel() for p in unet.parameters()):,} weights on {len(images)} images", flush=True)
        print(f"Loss of the last tenth of its steps: {pretrain(unet, recipe, images, digits):.4f}", flush=True)
        write_bytes(pretrained, save(unet.state_dict()))
    unet.load_state_dict(load(pretrained.read_bytes()))
    unet.requires_grad_(False).eval()

    blocks = [range(start, min(start + block_size, count)) for start in range(0, count, block_size)]
    files = [parts / f"block-{number:05}.safetensors" for number in range(len(blocks))]
    to_do = [(file, [plans[i] for i in block]) for file, block in zip(files, blocks, strict=True) if not file.exists()]
    print(f"{count} LoRAs of rank {recipe.rank}, prompt {recipe.prompt}: {len(blocks)} blocks, {len(blocks) - len(to_do)} of them there already",
          flush=True)
    progress = Progress(sum(plan.steps for _, block in to_do for plan in block), "steps")
    for file, block in to_do:
        weights, losses = train_block(unet, images, block, recipe, progress.advance)
        write_bytes(file, save({**weights, "step_loss": losses}))
    if to_do:
        progress.line()

    loaded = [load(file.read_bytes()) for file in files]
    joined = {name: torch.cat([one[name] for one in loaded]) for name in loaded[0]}
    losses = joined.pop("step_loss")
    for name, values in {**joined, "step_loss": losses}.items():
        if not values.isfinite().all():
            raise SystemExit(f"error: {name} has values that are not finite: lower --learning-rate")
    order = np.random.default_rng([recipe.seed, 2]).permutation(count)
    content = parquet_bytes(to_table(plans, joined, losses, recipe.rank, order))
    write_bytes(output, content)
    shutil.rmtree(parts)
    print(f"{output}: {count} LoRAs, {len(joined)} layers, {len(content) / 1e6:.2f} MB", flush=True)


def main(argv: list[str] | None = None) -> None:
    default = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.parquet", help="file to write")
    parser.add_argument("--loras", type=int, default=520, help="how many")
    parser.add_argument("--prompt", choices=("neutral", "named"), default=default.prompt, help="one context for all, or the digit's own")
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--steps", type=int, nargs="+", default=default.steps, help="training steps: one of these for each LoRA")
    parser.add_argument("--images", type=int, nargs="+", default=default.images, help="images: one of these for each LoRA")
    parser.add_argument("--groups", type=int, default=default.groups, help="clusters of each digit's images; a LoRA's images are of one")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="Adam's, for the LoRAs")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="images a step")
    parser.add_argument("--pretrain-steps", type=int, default=default.pretrain_steps)
    parser.add_argument("--pretrain-batch", type=int, default=default.pretrain_batch)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--block-size", type=int, default=20, help="LoRAs trained at once")
    parser.add_argument("--threads", type=int, default=1, help="of torch; another number may change the last digits")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".parquet":
        parser.error(f"--output {arguments.output}: the name of a Parquet file ends in .parquet")
    for name in ("loras", "rank", "steps", "images", "groups", "batch_size", "pretrain_steps", "pretrain_batch", "block_size", "threads"):
        value = getattr(arguments, name)
        if min(value if isinstance(value, (list, tuple)) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    if arguments.seed < 0 or not arguments.learning_rate > 0:
        parser.error("--seed is at least 0 and --learning-rate above it")
    torch.set_num_threads(arguments.threads)
    fields = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Recipe)}
    recipe = Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    build(arguments.output, arguments.loras, recipe, arguments.block_size)


if __name__ == "__main__":
    main()
