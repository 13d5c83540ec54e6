#!/usr/bin/env python3
"""Experiment 6: what SAE features tell of facts and hallucinations, one text at a time.

The reference of 06_comprehensive_analysis_parallel.py: every measure is written as it is defined, in float64
NumPy, and texts share nothing.
"""

import sys
from typing import NamedTuple

import numpy as np
from sae_analysis import program
from sae_analysis.language_model import Reader, load
from sae_analysis.measures import ENTROPY_FEATURES, NEGLIGIBLE, TOP_FEATURES, shape_of
from sae_analysis.noise import SCALE, noise_of
from sae_analysis.progress import Clock
from sae_analysis.rows import COMPLETIONS, row_of
from sae_analysis.samples import Sample
from torch import Tensor


class Layer(NamedTuple):
    """What a layer holds at a text's last token."""

    x: Tensor  # (1, width) the residual stream
    f: np.ndarray  # (F,) features
    y: np.ndarray  # (width,) the SAE's reconstruction of x
    rows: np.ndarray  # (n, width) decoder rows of the active features


class Geometry(NamedTuple):
    """The shape of a text's active decoder rows."""

    centroid: np.ndarray  # (width,)
    axis: np.ndarray  # (width,) the first principal axis
    sphericity: float
    dimensionality: float
    shape: str


def measure(work: program.Work) -> None:
    """Measure the samples that are not finished."""
    settings, run, clock = work.settings, work.run, work.clock
    with clock("load"):
        reader = load(settings, work.toy)
    missing = [sample for sample in work.samples if sample.id not in run.rows]
    with work.progress(3 * len(missing)) as progress:
        for sample in missing:
            z = noise_of(settings.seed, sample.id, settings.noise_draws, reader.width)
            row = measure_sample(reader, sample, z, clock)
            with clock("write"):
                run.add([row])
            progress.advance(1, 3)


def measure_sample(reader: Reader, sample: Sample, z: Tensor, clock: Clock) -> dict:
    """A sample's row; z (draws, width) is its noise."""
    prompt = read(reader, sample.texts[0], 1, clock)[0]
    with clock("geometry"):
        prompt_geometry = geometry(prompt)
    by_layer, values = {}, {}
    for name, text in zip(COMPLETIONS, sample.texts[1:], strict=True):
        layers = read(reader, text, len(reader.layers), clock)
        with clock("geometry"):
            shapes = [geometry(layer) for layer in layers]
        for number, layer, shape in zip(reader.layers, layers, shapes, strict=True):
            error = np.linalg.norm(layer.x[0].double().cpu().numpy() - layer.y)
            active = (int((layer.f > 0).sum()), float(error), gini(layer.f))
            by_layer[number, name] = (*active, shape.sphericity, shape.shape, shape.dimensionality)
        first, second, third = layers[:3]
        drift = angle(prompt_geometry.centroid, shapes[0].centroid)
        twist = angle(prompt_geometry.axis, shapes[0].axis)
        values[name] = {
            "centroid_drift": drift,
            "axis_twist": min(twist, 180 - twist),
            "stability": stability(reader, first, z, clock),
            "entropy": entropy(first.f),
            "cross_layer_consistency": cosine(second.f, third.f),
            "residual_consistency": cosine(second.y, third.y),
        }
    paired = {name: (values["fact"][name], values["hall"][name]) for name in values["fact"]}
    return row_of(sample, by_layer, paired)


def read(reader: Reader, text: str, count: int, clock: Clock) -> list[Layer]:
    """What the first `count` layers hold at a text's last token."""
    with clock("tokenise"):
        tokens = reader.tokenise(text)
    with clock("forward"):
        residuals = reader.residuals([tokens], count)
    layers = []
    for position, x in enumerate(residuals):
        with clock("sae"):
            f = reader.features(position, x)
            y = reader.reconstruction(position, f)
        rows = reader.decoder(position)[f[0] > 0]
        layers.append(Layer(x, *(tensor.detach().cpu().numpy() for tensor in (f[0], y[0], rows))))
    return layers


def geometry(layer: Layer) -> Geometry:
    """Principal axes of the active decoder rows, weighted by their features."""
    active, nothing = layer.f[layer.f > 0], np.zeros(layer.rows.shape[1])
    if len(active) == 0:
        return Geometry(nothing, nothing, 0.0, 0.0, "None")
    w = active / active.sum()
    centroid = w @ layer.rows
    # The covariance is S^T S with S = sqrt(w) (rows - centroid): its eigenvalues are the squares of S's
    # singular values, its axes the right singular vectors.
    _, singular, axes = np.linalg.svd(np.sqrt(w)[:, None] * (layer.rows - centroid), full_matrices=False)
    eigenvalues = singular**2
    eigenvalues[eigenvalues <= NEGLIGIBLE * eigenvalues[0]] = 0  # rounding
    if eigenvalues[0] == 0:
        return Geometry(centroid, nothing, 0.0, 0.0, shape_of(0.0, 0.0))
    a, b, c = np.sqrt(np.append(eigenvalues, [0, 0])[:3])
    dimensionality = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    return Geometry(centroid, axes[0], float(c / a), float(dimensionality), shape_of(b / a, c / a))


def stability(reader: Reader, layer: Layer, z: Tensor, clock: Clock) -> float:
    """Mean Jaccard index of the largest features with and without each draw of noise."""
    still, shares = largest(layer.f), []
    for draw in z.to(layer.x.device):
        with clock("sae"):
            moved = largest(reader.features(0, layer.x.add(draw, alpha=SCALE))[0].cpu().numpy())
        shares.append(len(still & moved) / len(still | moved) if still | moved else 1.0)
    return float(np.mean(shares))


def largest(f: np.ndarray) -> set[int]:
    """The numbers of the largest active features, TOP_FEATURES at most."""
    order = np.argsort(-f, kind="stable")[:TOP_FEATURES]
    return set(order[f[order] > 0].tolist())


def gini(f: np.ndarray) -> float:
    """Gini coefficient of the active features."""
    active = np.sort(f[f > 0])
    n = len(active)
    if n == 0:
        return 0.0
    return float(2 * (np.arange(1, n + 1) * active).sum() / (n * active.sum()) - (n + 1) / n)


def entropy(f: np.ndarray) -> float:
    """Shannon entropy in nats of the largest active features."""
    top = np.sort(f[f > 0])[-ENTROPY_FEATURES:]
    p = top / top.sum()
    return float(-(p * np.log(p)).sum())


def angle(first: np.ndarray, second: np.ndarray) -> float:
    """Degrees between two vectors, exact for small angles too; 0 where one vector is 0."""
    if not (first.any() and second.any()):
        return 0.0
    first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    return float(2 * np.degrees(np.arctan2(np.linalg.norm(first - second), np.linalg.norm(first + second))))


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine between two vectors; 0 where one of them is 0."""
    size = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / size) if size > 0 else 0.0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return program.main(argv, __doc__ or "", measure, batched=False)


if __name__ == "__main__":
    sys.exit(main())
