"""The measures of a text: functions of SAE features and residual vectors, batched over B texts.

f (B, F) are SAE features, none below 0, R (F, d) the rows of the SAE's decoder. A text's active features are
those above 0; w are their values over their sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOP_FEATURES = 10  # compared under noise
ENTROPY_FEATURES = 50
NEGLIGIBLE = 1e-12  # relative eigenvalues below it are rounding
TINIEST = torch.finfo(torch.float64).tiny
MOST_NUMBERS = 2**25  # in the decoder rows that are held at once: 256 MiB


class Geometry(NamedTuple):
    """The shape of the active features' decoder rows, weighted by w, of B texts; float64."""

    centroid: Tensor  # (B, d), 0 without an active feature
    axis: Tensor  # (B, d) the first principal axis, of length 1; 0 where nothing varies, or if not asked for
    sphericity: Tensor  # (B,) third semi-axis over the first
    dimensionality: Tensor  # (B,) participation ratio of the eigenvalues
    shapes: list[str]


def l0_norm(f: Tensor) -> Tensor:
    """(B,) how many features are active."""
    return (f > 0).sum(1)


def gini(f: Tensor) -> Tensor:
    """(B,) Gini coefficient of the active features: 2 sum(i f_(i)) / (n sum f) - (n + 1) / n over ascending
    f_(i); 0 without an active feature.
    """
    values = f.double().sort(1).values  # zeros first
    n = (values > 0).sum(1)
    rank = torch.arange(1, f.shape[1] + 1, device=f.device) - (f.shape[1] - n)[:, None]  # 1..n for the active
    total, count = values.sum(1), n.clamp_min(1).double()
    weighted = (rank.clamp_min(0) * values).sum(1)
    coefficient = 2 * weighted / (count * total.clamp_min(TINIEST)) - (n + 1) / count
    return torch.where(n > 0, coefficient, 0.0)


def geometry(f: Tensor, decoder: Tensor, with_axis: bool = True) -> Geometry:
    """Centroid, first axis and shape of each text's active decoder rows; without the axis in half the time.

    Texts are taken in the order of their numbers n of active features, as many at once as MOST_NUMBERS
    allows, and padded with rows of weight 0, which add zeros.
    """
    counts = (f > 0).sum(1).tolist()
    order = sorted(range(len(counts)), key=counts.__getitem__)
    parts: list[Geometry] = []
    end = len(order)
    while end:
        most = max(counts[order[end - 1]], 1)
        begin = max(end - max(MOST_NUMBERS // (most * decoder.shape[1]), 1), 0)
        parts.insert(0, geometry_at_once(f[order[begin:end]], decoder, most, with_axis))
        end = begin
    back = torch.tensor(order, device=f.device).argsort()
    shapes = [shape for part in parts for shape in part.shapes]
    return Geometry(
        torch.cat([part.centroid for part in parts])[back],
        torch.cat([part.axis for part in parts])[back],
        torch.cat([part.sphericity for part in parts])[back],
        torch.cat([part.dimensionality for part in parts])[back],
        [shapes[i] for i in back.tolist()],
    )


def geometry_at_once(f: Tensor, decoder: Tensor, most: int, with_axis: bool) -> Geometry:
    """The geometry of texts with at most `most` active features.

    The covariance C = sum w_i (r_i - c)(r_i - c)^T is S^T S (d x d), where row i of S is sqrt(w_i) (r_i - c).
    The n x n matrix S S^T has the same eigenvalues but zeros, and S^T v is the axis of its eigenvector v.
    """
    values, index = f.topk(most, dim=1)
    values = values.double().clamp_min(0)  # (B, n)
    total = values.sum(1, keepdim=True)
    w = values / total.clamp_min(TINIEST)
    rows = decoder[index].double()  # (B, n, d)
    centroid = (w[:, None] @ rows)[:, 0]
    scaled = rows.sub_(centroid[:, None]).mul_(w.sqrt()[:, :, None])
    is_wide = most > decoder.shape[1]  # then C is the smaller one
    smaller = scaled.mT @ scaled if is_wide else scaled @ scaled.mT
    smaller = smaller.cpu()  # a GPU decomposes one small matrix after the other, several times slower
    if with_axis:
        ascending, vectors = (part.to(f.device) for part in torch.linalg.eigh(smaller))
        axis = vectors[:, :, -1] if is_wide else (vectors[:, None, :, -1] @ scaled)[:, 0]
    else:
        ascending, axis = torch.linalg.eigvalsh(smaller).to(f.device), torch.zeros_like(centroid)
    eigenvalues = ascending.flip(1).clamp_min(0)
    eigenvalues = torch.where(eigenvalues > NEGLIGIBLE * eigenvalues[:, :1], eigenvalues, 0.0)
    axis = torch.where(eigenvalues[:, :1] > 0, axis / axis.norm(dim=1, keepdim=True).clamp_min(TINIEST), 0.0)
    semi = torch.nn.functional.pad(eigenvalues, (0, 3))[:, :3].sqrt()
    ratios = semi / torch.where(semi[:, :1] > 0, semi[:, :1], 1.0)
    squares = eigenvalues.square().sum(1)
    dimensionality = torch.where(squares > 0, eigenvalues.sum(1).square() / squares.clamp_min(TINIEST), 0.0)
    shapes = [
        shape_of(b, c) if active else "None"
        for (_, b, c), active in zip(ratios.tolist(), (total[:, 0] > 0).tolist(), strict=True)
    ]
    return Geometry(centroid, axis, ratios[:, 2], dimensionality, shapes)


def shape_of(b: float, c: float) -> str:
    """The class of an ellipsoid whose second and third semi-axes are the shares b and c of the first."""
    if b > 0.9 and c > 0.9:
        return "Spherical"
    if b > 0.8 and c < 0.6:
        return "Oblate"
    if b < 0.6 and c < 0.6:
        return "Prolate"
    return "Triaxial"


def angle(first: Tensor, second: Tensor) -> Tensor:
    """(B,) angles in degrees between vectors (B, d); 0 where one of them is 0."""
    first, second = first.double(), second.double()
    a, b = first.norm(dim=1, keepdim=True), second.norm(dim=1, keepdim=True)
    unit_a, unit_b = first / a.clamp_min(1e-300), second / b.clamp_min(1e-300)
    # Exact for small angles too, where the arc cosine is not.
    degrees = 2 * torch.rad2deg(torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1)))
    return torch.where((a > 0).logical_and(b > 0)[:, 0], degrees, 0.0)


def axis_angle(first: Tensor, second: Tensor) -> Tensor:
    """(B,) angles in degrees, 0 to 90, between axes (B, d), which have no sign; 0 where one of them is 0."""
    degrees = angle(first, second)
    return torch.minimum(degrees, 180 - degrees)


def entropy(f: Tensor) -> Tensor:
    """(B,) Shannon entropy in nats of the largest active features, normalised to sum 1; 0 without any."""
    top = f.topk(min(ENTROPY_FEATURES, f.shape[1]), dim=1).values.double().clamp_min(0)
    p = top / top.sum(1, keepdim=True).clamp_min(TINIEST)
    return torch.special.entr(p).sum(1)


def top_sets(f: Tensor) -> list[set[int]]:
    """The numbers of each text's largest active features, TOP_FEATURES at most."""
    values, index = f.topk(min(TOP_FEATURES, f.shape[1]), dim=1)
    return [
        {feature for feature, value in zip(features, of_text, strict=True) if value > 0}
        for features, of_text in zip(index.tolist(), values.tolist(), strict=True)
    ]


def jaccard(first: set[int], second: set[int]) -> float:
    """Size of the intersection over that of the union; 1 for two empty sets."""
    union = first | second
    return len(first & second) / len(union) if union else 1.0


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """(B,) cosines between vectors (B, d); 0 where one of them is 0."""
    first, second = first.double(), second.double()
    size = first.norm(dim=1) * second.norm(dim=1)
    return torch.where(size > 0, (first * second).sum(1) / size.clamp_min(1e-300), 0.0)
