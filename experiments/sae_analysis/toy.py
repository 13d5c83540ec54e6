"""A toy language model and its SAEs, made on the spot. Its numbers mean nothing about Gemma.

It needs no network: a Gemma-2 of four layers is trained on the samples' own texts until it knows them by
heart, and SAELens trains a JumpReLU SAE on each layer that is asked for.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpointing import hash_of

from .language_model import tokenise

log = logging.getLogger("sae_analysis")

VERSION = 1  # raise it when the toy is made in another way
SEED = 0
LAYERS, WIDTH, FEATURES = 4, 64, 512
WARNING = "TOY MODEL: it is trained on these very texts, and its numbers mean nothing about Gemma."


class Effort(NamedTuple):
    """How long the toy is trained: steps of the language model and of each SAE."""

    model: int
    sae: int


ENOUGH = Effort(model=300, sae=400)


def make_toy(folder: Path, texts: list[str], layers: tuple[int, ...], effort: Effort = ENOUGH) -> Path:
    """The toy of these texts in a folder of its own below `folder`, made if it is not there.

    It holds a model and a tokenizer of transformers, and layer_<L>/ of SAELens.
    """
    made_with = [texts, layers, effort, VERSION, *map(version, ("torch", "transformers", "sae-lens"))]
    place = folder / f"tiny-{hash_of(made_with)[:12]}"
    if place.is_dir():
        return place
    log.info(f"Training the toy model on {len(texts)} texts (once; about a minute): {place}")
    folder.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".tiny-", dir=folder))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            build(building, texts, layers, effort)
        building.chmod(0o755)
        try:
            os.rename(building, place)
        except OSError:  # another process made it meanwhile
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return place


def build(folder: Path, texts: list[str], layers: tuple[int, ...], effort: Effort) -> None:
    """Train tokenizer, model and SAEs, and write them."""
    tokenizer = train_tokenizer(texts)
    rows = [tokenise(tokenizer, text) for text in texts]
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    model = train_model(tokens, tokenizer, effort.model)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    is_text = (tokens != tokenizer.pad_token_id) & (tokens != tokenizer.bos_token_id)
    for layer, x in zip(layers, residuals(model, tokens, layers), strict=True):
        train_sae(x[is_text], layer, effort.sae).save_inference_model(folder / f"layer_{layer}")


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-pair tokenizer of 1,024 tokens; it knows every text, by bytes if need be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>")


def gemma(tokenizer: Any, **shape: int) -> Any:
    """A Gemma-2 of a given shape with weights drawn by torch's generator."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        query_pre_attn_scalar=shape["head_dim"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        attn_implementation="eager",
        **shape,
    )
    return transformers.Gemma2ForCausalLM(config)


def train_model(tokens: Tensor, tokenizer: Any, steps: int) -> Any:
    """A small Gemma-2 that was trained to go on with texts (B, length), padded on the right."""
    model = gemma(
        tokenizer,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH // 4,
        max_position_embeddings=max(256, tokens.shape[1]),
    )
    labels = tokens.masked_fill(tokens == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(tokens), (min(64, len(tokens)),))
        longest = int((labels[batch] >= 0).sum(1).max())
        loss = model(input_ids=tokens[batch, :longest], labels=labels[batch, :longest]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def residuals(model: Any, tokens: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    """The residual stream (B, length, width) after each of some layers."""
    found: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [model.model.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return [found[layer] for layer in layers]


def train_sae(x: Tensor, layer: int, steps: int) -> Any:
    """A JumpReLU SAE of vectors (N, width), trained by SAELens to about forty active features a text."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    batch = min(1024, len(x))
    config = JumpReLUTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=FEATURES,
        l0_coefficient=1.0,
        l0_warm_up_steps=steps // 4,
        jumprelu_init_threshold=0.1,
        jumprelu_bandwidth=0.1,
        normalize_activations="expected_average_only_in",
    )
    config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    config.metadata.model_name = "toy"
    training = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=2e-3,
        lr_end=2e-4,
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
    )

    def batches():
        while True:
            yield x[torch.randint(len(x), (batch,))]

    with contextlib.redirect_stderr(io.StringIO()):  # its bars, which are no lines of a log
        return SAETrainer(training, JumpReLUTrainingSAE(config), batches()).fit()
