"""A Gemma-2 of random weights with random SAEs, to time what a model of its shape costs."""

from __future__ import annotations

from pathlib import Path

import torch

from .toy import gemma, train_tokenizer

ACTIVE = 70  # features a text, about what Gemma Scope's canonical SAEs have
GEMMA_DEPTH = 26
GEMMA_LAYERS = (5, 12, 20)


def make_random(folder: Path, texts: list[str], depth: int, width: int, features: int) -> list[int]:
    """Write model, tokenizer and an SAE for three layers to a folder; returns the layers.

    `width` must be a multiple of 64. The layers lie as deep as 5, 12 and 20 do in Gemma-2-2B's 26.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = train_tokenizer(texts)
        model = gemma(
            tokenizer,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=max(width // 64, 2),
            num_key_value_heads=max(width // 128, 1),
            head_dim=64,
        ).eval()
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        layers = [layer * depth // GEMMA_DEPTH for layer in GEMMA_LAYERS]
        for layer in layers:
            save_sae(width, features, folder / f"layer_{layer}")
    return layers


def save_sae(width: int, features: int, folder: Path) -> None:
    """Write a random SAE that keeps ACTIVE features of every text."""
    from sae_lens import TopKSAE, TopKSAEConfig

    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=features, k=ACTIVE))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(features, width), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.save_model(folder)
