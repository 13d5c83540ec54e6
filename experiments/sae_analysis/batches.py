"""The batched version: texts of equal length are read and measured together.

Texts are not padded, because a batch holds texts of one length only. So the last token of every row is a real
one, and on a CPU a text gives the same residual vector in a batch as alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import AnalysisError, measures
from .language_model import Reader, is_out_of_memory
from .noise import SCALE, noise_of
from .progress import Clock
from .rows import COMPLETIONS, row_of
from .samples import TEXTS, Sample

log = logging.getLogger("sae_analysis")

PROMPT = 0  # position of the prompt among a sample's texts


class Text(NamedTuple):
    """One of a sample's three texts, in tokens."""

    sample: int  # position in the list of samples
    sample_id: str
    position: int  # in TEXTS
    tokens: list[int]


Batch = list[Text]  # texts of one length; all are prompts, or none is


class Measured(NamedTuple):
    """What a text gives. Of a prompt, the first layer's geometry alone is needed."""

    centroid: Tensor  # (width,) float64
    axis: Tensor  # (width,) float64
    by_layer: tuple[tuple, ...] = ()  # LAYER_MEASURES of each layer
    stability: float = 0.0
    entropy: float = 0.0
    cross_layer_consistency: float = 0.0
    residual_consistency: float = 0.0


def plan(samples: list[Sample], tokenise: Callable[[str], list[int]], batch_size: int) -> list[Batch]:
    """The batches of all samples, short texts first: as many texts at most as batch_size samples have."""
    groups: dict[tuple[int, bool], Batch] = {}
    for number, sample in enumerate(samples):
        for position, text in enumerate(sample.texts):
            tokens = tokenise(text)
            group = groups.setdefault((len(tokens), position == PROMPT), [])
            group.append(Text(number, sample.id, position, tokens))
    most = batch_size * len(TEXTS)
    return [group[i : i + most] for _, group in sorted(groups.items()) for i in range(0, len(group), most)]


class Measurer:
    """Measures batches with one model; halves them for good when memory runs out."""

    def __init__(self, reader: Reader, seed: int, noise_draws: int):
        self.reader, self.seed, self.noise_draws = reader, seed, noise_draws
        self.most: int | None = None  # texts at once
        self.noisy = torch.empty(0)  # used again by all draws and batches
        self.clock = Clock(reader.device)

    def measure(self, batch: Batch) -> list[Measured]:
        """What each text of a batch gives. Raises AnalysisError if one text alone does not fit."""
        found: list[Measured] = []
        while len(found) < len(batch):
            size = min(self.most or len(batch), len(batch) - len(found))
            try:
                found += self.measure_at_once(batch[len(found) : len(found) + size])
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if size == 1:
                raise AnalysisError(
                    "one text alone does not fit into memory: use --load-in-8bit or another --device"
                )
            self.most = size // 2
            log.warning(
                f"Out of memory with {size} texts at once: going on with {self.most}. Results do not change."
            )
            self.noisy = torch.empty(0)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

    @torch.no_grad()
    def measure_at_once(self, batch: Batch) -> list[Measured]:
        """What each of B texts of one length gives."""
        reader, clock = self.reader, self.clock
        of_prompts = batch[0].position == PROMPT
        with clock("forward"):
            residuals = reader.residuals([text.tokens for text in batch], 1 if of_prompts else None)
        with clock("sae"):
            f = reader.features(0, residuals[0])
        with clock("geometry"):
            first = measures.geometry(f, reader.decoder(0))
        if of_prompts:
            return [Measured(*pair) for pair in zip(first.centroid.cpu(), first.axis.cpu(), strict=True)]
        return self.completions(batch, residuals, f, first)

    def completions(
        self, batch: Batch, residuals: list[Tensor], of_first: Tensor, first: measures.Geometry
    ) -> list[Measured]:
        """What each of B completions gives.

        `residuals` (B, width) of each layer; `of_first` and `first` are features and geometry of the first.
        """
        reader, clock = self.reader, self.clock
        by_layer, features, reconstructions = [], [], []
        for position, x in enumerate(residuals):
            with clock("sae"):
                f = reader.features(position, x) if position else of_first
                # Before the SAE encodes anything else: some decode with the norm of their last input.
                y = reader.reconstruction(position, f)
            with clock("geometry"):
                shape = measures.geometry(f, reader.decoder(position), with_axis=False) if position else first
            with clock("other measures"):
                by_layer.append(layer_measures(x, f, y, shape))
            if position in (1, 2):
                features.append(f)
                reconstructions.append(y)
        stability = self.stability(batch, residuals[0], of_first)
        with clock("other measures"):
            entropy = measures.entropy(of_first).tolist()
            of_features = measures.cosine(*features).tolist()
            of_space = measures.cosine(*reconstructions).tolist()
        return [
            Measured(*values)
            for values in zip(
                first.centroid.cpu(),
                first.axis.cpu(),
                zip(*by_layer, strict=True),
                stability,
                entropy,
                of_features,
                of_space,
                strict=True,
            )
        ]

    def stability(self, batch: Batch, x: Tensor, f: Tensor) -> list[float]:
        """(B) mean Jaccard index of the largest features of x (B, width) with and without noise."""
        with self.clock("noise"):
            z = torch.stack(
                [noise_of(self.seed, text.sample_id, self.noise_draws, x.shape[1]) for text in batch], dim=1
            ).to(x.device)  # (draws, B, width)
            if len(self.noisy) < len(x) or self.noisy.device != x.device:
                self.noisy = torch.empty_like(x)
        still, shares = measures.top_sets(f), [0.0] * len(x)
        for draw in z:
            with self.clock("noise"):
                noisy = torch.add(x, draw, alpha=SCALE, out=self.noisy[: len(x)])
            with self.clock("sae"):
                moved = self.reader.features(0, noisy)
            with self.clock("other measures"):
                pairs = zip(still, measures.top_sets(moved), strict=True)
                shares = [share + measures.jaccard(a, b) for share, (a, b) in zip(shares, pairs, strict=True)]
        return [share / self.noise_draws for share in shares]


def layer_measures(x: Tensor, f: Tensor, y: Tensor, geometry: measures.Geometry) -> list[tuple]:
    """LAYER_MEASURES of B texts: x and its reconstruction y (B, width), features f (B, F)."""
    return list(
        zip(
            measures.l0_norm(f).tolist(),
            (x.to(y) - y).norm(dim=1).tolist(),
            measures.gini(f).tolist(),
            geometry.sphericity.tolist(),
            geometry.shapes,
            geometry.dimensionality.tolist(),
            strict=True,
        )
    )


def rows_of(
    samples: list[Sample], layers: tuple[int, ...], found: Iterator[tuple[Batch, list[Measured]]]
) -> Iterator[list[dict]]:
    """For each batch, the rows of the samples whose three texts are measured with it."""
    waiting: dict[int, dict[int, Measured]] = {}
    for batch, measured in found:
        complete = []
        for text, values in zip(batch, measured, strict=True):
            of_sample = waiting.setdefault(text.sample, {})
            of_sample[text.position] = values
            if len(of_sample) == len(TEXTS):
                complete.append(sample_row(samples[text.sample], layers, waiting.pop(text.sample)))
        yield complete


def sample_row(sample: Sample, layers: tuple[int, ...], texts: dict[int, Measured]) -> dict:
    """The row of a sample from its prompt, its fact and its hallucination."""
    prompt, *completions = (texts[position] for position in range(len(TEXTS)))
    by_layer = {
        (layer, name): completion.by_layer[i]
        for i, layer in enumerate(layers)
        for name, completion in zip(COMPLETIONS, completions, strict=True)
    }
    centroids = torch.stack([completion.centroid for completion in completions])
    axes = torch.stack([completion.axis for completion in completions])
    paired = {
        name: tuple(getattr(completion, name) for completion in completions)
        for name in ("stability", "entropy", "cross_layer_consistency", "residual_consistency")
    }
    paired["centroid_drift"] = tuple(measures.angle(prompt.centroid.expand_as(centroids), centroids).tolist())
    paired["axis_twist"] = tuple(measures.axis_angle(prompt.axis.expand_as(axes), axes).tolist())
    return row_of(sample, by_layer, paired)
