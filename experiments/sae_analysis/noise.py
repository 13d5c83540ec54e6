"""The noise that stability is measured under."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SCALE = 0.1  # standard deviation, in the residual stream's units


def noise_of(seed: int, sample_id: str, draws: int, width: int) -> Tensor:
    """(draws, width) standard normal numbers that the seed and the sample's id alone decide.

    So neither batches nor order nor devices change them, and a sample's two completions meet the same noise.
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(draws, width, generator=generator)
