"""Training the digits' UNet, and LoRAs on it, a block of LoRAs at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from ablation.making.progress import ProgressLine

NUM_DIGITS = 10
NEUTRAL = NUM_DIGITS  # number of the context of no class, after those of the ten digits
# With a single token attention has nothing to choose, and to_q learns nothing.
CONTEXT_TOKENS, CONTEXT_WIDTH = (4, 32)
NUM_TIMESTEPS = 1000
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8  # torch's defaults


@dataclass(frozen=True)
class DigitsRecipe:
    """Everything that the weights of a LoRA depend on, besides its number."""

    prompt: str = "neutral"  # neutral: one context for all LoRAs; named: the digit's own
    rank: int = 2
    steps: tuple[int, ...] = (27, 30, 33)  # a LoRA is trained for one of these numbers of steps
    images: tuple[int, ...] = (4, 5, 6)  # on one of these numbers of images
    groups: int = 26  # parts of each digit's images; a LoRA's images are of one
    grouping: str = "random"  # or "clusters", by k-means on the pixels
    learning_rate: float = 1e-2
    batch_size: int = 8
    pretrain_steps: int = 150
    pretrain_batch: int = 32
    seed: int = 0


class AdapterPlan(NamedTuple):
    """A LoRA before it is trained."""

    digit: int
    group: int
    images: np.ndarray  # numbers of its images among the 1,797
    steps: int
    seed: int  # of its initial weights and batches

    @property
    def category_label(self) -> str:
        """The class."""
        return f"digit_{self.digit}"

    @property
    def category_name(self) -> str:
        """The group within the class."""
        return f"digit_{self.digit}/{self.group}"


# --- the network


def make_unet() -> UNet2DConditionModel:
    """A UNet of about a million weights; it has seven transformer blocks, so 28 modules carry a LoRA."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=CONTEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet.set_attn_processor(AttnProcessor())  # the fused kernel has no rule for vmap
    return unet


def make_contexts() -> Tensor:
    """(11, tokens, width): in place of a text encoder,
    fixed random tokens for each digit and for no class.
    """
    return torch.randn(
        NUM_DIGITS + 1, CONTEXT_TOKENS, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(7)
    )


def signal_shares() -> Tensor:
    """(levels,) the share of the image's variance that is left at each noise level; a cosine schedule."""
    return DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS, beta_schedule="squaredcos_cap_v2").alphas_cumprod


def add_noise(images: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
    """Noisy images; images and noise are (..., 1, 8, 8), the image's shares of the variance (...)."""
    shares = shares[..., None, None, None]
    return shares.sqrt() * images + (1 - shares).sqrt() * noise


def pretrain(unet: UNet2DConditionModel, recipe: DigitsRecipe, images: Tensor, digits: np.ndarray) -> float:
    """Teach the UNet to predict the noise in all digits,
    with the digit's context or, half of the time, the neutral one.

    Then both kinds of context mean something to it, whichever the LoRAs are given. Returns the mean loss of
    the last tenth of the steps.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    contexts, shares, labels = make_contexts(), signal_shares(), torch.from_numpy(digits)
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=max(recipe.pretrain_steps, 2)
    )
    losses = []
    progress = ProgressLine(recipe.pretrain_steps, "pre-training steps")
    for _ in range(recipe.pretrain_steps):
        batch = torch.randint(len(images), (recipe.pretrain_batch,), generator=generator)
        named = torch.rand(recipe.pretrain_batch, generator=generator) < 0.5
        context = contexts[torch.where(named, labels[batch], NEUTRAL)]
        level = torch.randint(NUM_TIMESTEPS, (recipe.pretrain_batch,), generator=generator)
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
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


# --- the LoRAs


def lora_modules(unet: UNet2DConditionModel) -> list[str]:
    """Names of the linear layers that get a LoRA, sorted: to_q and to_v of self- and cross-attention."""
    ends = ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")
    return sorted(name for name, _ in unet.named_modules() if name.endswith(ends))


def column_of(module: str, side: str) -> str:
    """The name under which diffusers saves a module's `down` or `up`."""
    return f"unet.{module}.lora.{side}.weight"


class Draws(NamedTuple):
    """Everything random in a LoRA's training of S steps with batches of B images."""

    loras: dict[str, Tensor]  # initial weights by column: down (rank, in), up (out, rank)
    batches: Tensor  # (S, B) positions in the plan's images
    levels: Tensor  # (S, B) noise levels
    noise: Tensor  # (S, B, 1, 8, 8)


def draw(plan: AdapterPlan, unet: UNet2DConditionModel, recipe: DigitsRecipe) -> Draws:
    """The random numbers of a LoRA: `down` Gaussian with std 1/rank,
    `up` zero, as peft's init_lora_weights="gaussian".

    A batch has every image once before any comes twice, and its noise levels are spread evenly. Levels and
    noise are one sequence for all LoRAs. So LoRAs differ by their images and initial weights, and not by
    luck.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    loras = {}
    for module in lora_modules(unet):
        out_features, in_features = unet.get_submodule(module).weight.shape
        loras[column_of(module, "down")] = (
            torch.randn(recipe.rank, in_features, generator=generator) / recipe.rank
        )
        loras[column_of(module, "up")] = torch.zeros(out_features, recipe.rank)
    common = torch.Generator().manual_seed(recipe.seed)
    size = (max(plan.steps, *recipe.steps), recipe.batch_size)
    levels = (torch.arange(recipe.batch_size) + torch.rand(size, generator=common)) * (
        NUM_TIMESTEPS / recipe.batch_size
    )
    return Draws(
        loras,
        torch.stack([shuffled(len(plan.images), recipe.batch_size, generator) for _ in range(plan.steps)]),
        levels.long().clamp_max(NUM_TIMESTEPS - 1)[: plan.steps],  # rounding may reach the next one
        torch.randn(*size, 1, 8, 8, generator=common)[: plan.steps],
    )


def shuffled(items: int, count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers below `items` in random order; all come once before any comes again."""
    return torch.cat([torch.randperm(items, generator=generator) for _ in range(-(-count // items))])[:count]


def train_block(
    unet: UNet2DConditionModel,
    images: Tensor,
    plans: list[AdapterPlan],
    recipe: DigitsRecipe,
    on_steps: Callable[[int], None] = lambda made: None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Fine-tune several LoRAs at once with Adam:
    {column: (n, rows, cols)}, and the loss (n,) of each one's last step.

    They share the frozen weights and nothing else. A LoRA that has made its steps is set aside and the others
    go on. `unet`'s dtype is the one that is computed in. `on_steps` is told how many LoRAs have just made a
    step.
    """
    block = AdapterPack(unet, images, plans, recipe)
    for step in range(max(plan.steps for plan in plans)):
        losses = block.step(step)
        on_steps(len(block.active))
        block.set_aside_finished(step, losses)
    return block.trained, block.last_losses


class AdapterPack:
    """LoRAs that are trained together.
    `active` numbers those that still train; tensors have a row for each of them.
    """

    def __init__(
        self, unet: UNet2DConditionModel, images: Tensor, plans: list[AdapterPlan], recipe: DigitsRecipe
    ):
        self.images, self.plans, self.recipe = images, plans, recipe
        self.dtype = next(unet.parameters()).dtype
        self.shares = signal_shares().to(self.dtype)
        self.drawn = [draw(plan, unet, recipe) for plan in plans]
        columns = self.drawn[0].loras
        self.loras = {
            column: torch.stack([d.loras[column] for d in self.drawn]).to(self.dtype) for column in columns
        }
        # Adam's moments.
        self.mean = {column: torch.zeros_like(weights) for column, weights in self.loras.items()}
        self.square = {column: torch.zeros_like(weights) for column, weights in self.loras.items()}
        numbers = [plan.digit if recipe.prompt == "named" else NEUTRAL for plan in plans]
        self.contexts = make_contexts().to(self.dtype)[numbers]  # (n, tokens, width)
        self.trained = {column: torch.empty_like(weights) for column, weights in self.loras.items()}
        self.last_losses = torch.empty(len(plans), dtype=self.dtype)
        self.active = list(range(len(plans)))
        self.gradients_and_losses = vmap(grad_and_value(self.loss_function(unet)))

    def loss_function(self, unet: UNet2DConditionModel) -> Callable[..., Tensor]:
        """The loss of one LoRA on one batch, as a function of its weights."""
        frozen = {name: parameter.detach() for name, parameter in unet.named_parameters()}
        modules = lora_modules(unet)

        def loss(
            weights: dict[str, Tensor], noisy: Tensor, level: Tensor, noise: Tensor, context: Tensor
        ) -> Tensor:
            changed = {}
            for module in modules:
                change = weights[column_of(module, "up")] @ weights[column_of(module, "down")]
                changed[f"{module}.weight"] = frozen[f"{module}.weight"] + change
            context = context.expand(len(noisy), *context.shape)
            predicted = functional_call(unet, frozen | changed, (noisy, level, context)).sample
            return torch.nn.functional.mse_loss(predicted, noise)

        return loss

    def step(self, step: int) -> Tensor:
        """One step of Adam for every active LoRA. Returns their losses (n',)."""
        drawn = [(self.plans[i], self.drawn[i]) for i in self.active]
        batch = torch.stack([self.images[plan.images[d.batches[step].numpy()]] for plan, d in drawn])
        levels = torch.stack([d.levels[step] for _, d in drawn])  # (n', B)
        noise = torch.stack([d.noise[step] for _, d in drawn]).to(self.dtype)  # (n', B, 1, 8, 8)
        noisy = add_noise(batch.to(self.dtype), noise, self.shares[levels])
        gradients, losses = self.gradients_and_losses(self.loras, noisy, levels, noise, self.contexts)
        beta1, beta2 = ADAM_BETAS
        rate = self.recipe.learning_rate / (1 - beta1 ** (step + 1))
        for column, gradient in gradients.items():
            self.mean[column].lerp_(gradient, 1 - beta1)
            self.square[column].lerp_(gradient.square(), 1 - beta2)
            size = (self.square[column] / (1 - beta2 ** (step + 1))).sqrt() + ADAM_EPSILON
            self.loras[column] = self.loras[column] - rate * self.mean[column] / size
        return losses

    def set_aside_finished(self, step: int, losses: Tensor) -> None:
        """Keep the weights of the LoRAs whose last step this was; the others stay active."""
        going = [place for place, i in enumerate(self.active) if self.plans[i].steps > step + 1]
        if len(going) == len(self.active):
            return
        done = [place for place, i in enumerate(self.active) if self.plans[i].steps == step + 1]
        numbers = [self.active[place] for place in done]
        self.last_losses[numbers] = losses[done]
        for column, weights in self.loras.items():
            self.trained[column][numbers] = weights[done]
        self.loras, self.mean, self.square = (
            {column: values[going] for column, values in stack.items()}
            for stack in (self.loras, self.mean, self.square)
        )
        self.contexts, self.active = self.contexts[going], [self.active[place] for place in going]
