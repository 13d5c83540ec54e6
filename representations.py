"""The nine representations: what numbers describe a batch of matrices.

Each is a pure function (n, rows, cols) float32 -> (n, width) float32 on the same device: row i of the result depends
on matrix i alone. N = rows*cols, m = min(rows, cols); x is a matrix as a vector of its N entries. Sums run in float64.
Definitions follow the project's design, section 5: percentiles interpolate linearly, the median is the lower middle
value, skewness and kurtosis are standardised moments (kurtosis of a normal sample is about 3, not 0), entropies are in
nats, s_1 >= s_2 >= ... are the singular values. A constant matrix has std, skewness, kurtosis and histogram entropy 0.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from settings import ENSEMBLE_PARTS

EPS = 1e-8
TOP = 10                  # singular values and FFT magnitudes kept
BINS = 50                 # of the histogram behind info_theoretic
EIGH_BATCH = 16_384       # matrices a call: cuSOLVER fails on larger batches
SLICE_WEIGHTS = {"cpu": 2**17, "gpu": 2**24}   # weights described at a time: on a CPU what stays in a core's cache
GRAM_IS_EXACT_ABOVE = 1e-4  # of s_m/s_1: below it, squaring loses more than half of float64's digits


class Layer:
    """A batch of matrices with the intermediate results that several representations share, each computed once."""

    def __init__(self, w: Tensor):
        if w.ndim != 3 or 0 in w.shape:
            raise ValueError(f"expected a non-empty batch (n, rows, cols), got {tuple(w.shape)}")
        self.w = w.float()                                               # (n, rows, cols)
        self.x = self.w.flatten(1)                                       # (n, N)
        self.N = self.x.shape[1]
        self.m = min(w.shape[1:])

    @classmethod
    def of(cls, w: Tensor | Layer) -> Layer:
        return w if isinstance(w, Layer) else cls(w)

    @cached_property
    def sorted(self) -> Tensor:
        """Entries ascending. NumPy's sort uses SIMD and is far faster than torch's on a CPU."""
        if self.x.device.type == "cpu":
            return torch.from_numpy(np.sort(self.x.detach().numpy(), axis=1))   # (n, N)
        return self.x.sort(dim=1).values                                 # (n, N)

    @cached_property
    def min(self) -> Tensor:
        return self.sorted[:, 0].double()                                # (n,)

    @cached_property
    def max(self) -> Tensor:
        return self.sorted[:, -1].double()                               # (n,)

    @cached_property
    def mean(self) -> Tensor:
        return self.x.sum(1, dtype=torch.float64) / self.N               # (n,) exact for a constant: 24 bits times N fit, so its std is 0

    @cached_property
    def centred(self) -> Tensor:
        return self.x.double() - self.mean[:, None]                      # (n, N)

    @cached_property
    def central_sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the entries of |d|, d^2, d^3 and d^4 with d = x - mean; (n,) each, float64."""
        d = self.centred
        d2 = d * d                                                       # (n, N)
        return d.abs().sum(1), d2.sum(1), torch.linalg.vecdot(d2, d), torch.linalg.vecdot(d2, d2)

    @cached_property
    def std(self) -> Tensor:
        """With N-1; 0 for one element."""
        return (self.central_sums[1] / max(self.N - 1, 1)).sqrt()        # (n,)

    @cached_property
    def skewness(self) -> Tensor:
        return self.central_sums[2] / self.N / (self.std + EPS) ** 3     # (n,)

    @cached_property
    def kurtosis(self) -> Tensor:
        return self.central_sums[3] / self.N / (self.std + EPS) ** 4     # (n,)

    @cached_property
    def sum_of_squares(self) -> Tensor:
        return self.central_sums[1] + self.N * self.mean**2              # (n,)

    @cached_property
    def frobenius(self) -> Tensor:
        return self.sum_of_squares.sqrt()                                # (n,)

    @cached_property
    def singular_values(self) -> Tensor:
        """All m of each matrix, descending, float64.

        Square roots of the eigenvalues of the float64 Gram matrix of the shorter side. An eigenvalue is good to
        1e-16 s_1^2, so ill-conditioned matrices (a LoRA of less than its nominal rank) are done again by a float64 SVD.
        """
        if self.m == 1:
            return self.frobenius[:, None]                               # (n, 1)
        rows, cols = self.w.shape[1:]
        wide = (self.w if rows <= cols else self.w.mT).double()          # (n, m, longer side)
        gram = wide @ wide.mT                                            # (n, m, m)
        eigenvalues = torch.cat([torch.linalg.eigvalsh(part) for part in gram.split(EIGH_BATCH)])
        s = eigenvalues.clamp_min(0).sqrt().flip(1)                      # (n, m)
        ill = s[:, -1] < GRAM_IS_EXACT_ABOVE * s[:, 0]
        if not s.is_meta and ill.any():                                  # which rows: a question of values, not of shapes
            s[ill] = torch.linalg.svdvals(wide[ill])
        return s

    @cached_property
    def fft_magnitudes(self) -> tuple[Tensor, Tensor]:
        """|2-D FFT|, unnormalised: the bins that stand once, and those whose mirror image stands for a second one.

        The FFT of a real matrix is conjugate-symmetric, so half of it is computed; along the longer side, because the
        magnitudes of a transposed matrix are the same. In float64: a strong wave's float32 rounding would drown the other
        bins. The mean, which shows in bin (0, 0) alone, is put back after, so that a constant has zeros elsewhere.
        (n, a) and (n, b) float64 with a + 2b = N.
        """
        rows, cols = self.w.shape[1:]
        centred = self.centred.view_as(self.w)
        wide = centred if rows <= cols else centred.mT
        half = torch.fft.rfft2(wide).abs()                               # (n, m, longer // 2 + 1)
        half[:, 0, 0] = self.N * self.mean.abs()
        longer = wide.shape[2]
        mirrored = slice(1, (longer + 1) // 2)
        once = [0] if longer % 2 else [0, longer // 2]
        return half[:, :, once].flatten(1), half[:, :, mirrored].flatten(1)

    def percentiles(self, *percents: float) -> Tensor:
        """Linearly interpolated between the sorted entries, float64."""
        positions = [percent / 100 * (self.N - 1) for percent in percents]
        below = self.sorted[:, [math.floor(p) for p in positions]].double()
        above = self.sorted[:, [math.ceil(p) for p in positions]].double()
        fraction = torch.tensor([p - math.floor(p) for p in positions], dtype=torch.float64, device=self.x.device)
        return below + (above - below) * fraction                        # (n, len(percents))


def columns(*parts: Tensor) -> Tensor:
    """Side by side as float32; a part is one column (n,) or several (n, k)."""
    return torch.cat([part[:, None] if part.ndim == 1 else part for part in parts], dim=1).float()


def simple_stats(w: Tensor | Layer) -> Tensor:
    """Frobenius norm, mean, std, max, min, in weight units. (n, rows, cols) -> (n, 5)."""
    layer = Layer.of(w)
    return columns(layer.frobenius, layer.mean, layer.std, layer.max, layer.min)


def rank_based(w: Tensor | Layer) -> Tensor:
    """Percentiles 1 5 10 25 50 75 90 95 99, p75-p25, p99-p1, in weight units. (n, rows, cols) -> (n, 11)."""
    p = Layer.of(w).percentiles(1, 5, 10, 25, 50, 75, 90, 95, 99)        # (n, 9)
    return columns(p, p[:, 5] - p[:, 3], p[:, 8] - p[:, 0])


def stats(w: Tensor | Layer) -> Tensor:
    """Mean, std, median (lower middle value), min, max in weight units; skewness, kurtosis. (n, rows, cols) -> (n, 7)."""
    layer = Layer.of(w)
    median = layer.sorted[:, (layer.N - 1) // 2].double()
    return columns(layer.mean, layer.std, median, layer.min, layer.max, layer.skewness, layer.kurtosis)


def spectral(w: Tensor | Layer) -> Tensor:
    """Profile of the singular values. (n, rows, cols) -> (n, 32).

    s_1..s_10 (weight units, padded with 0); their shares s_i/sum(s); nine gaps (s_i - s_{i+1})/(s_i + EPS), 0 for
    i >= m; entropy of the shares (nats); condition number s_1/max(s_m, 1e-6 s_1); nuclear norm. Shares, entropy and
    nuclear norm use all m values. A zero matrix has shares, entropy and condition number 0.
    """
    layer = Layer.of(w)
    s = layer.singular_values                                            # (n, m)
    nuclear = s.sum(1)                                                   # (n,)
    shares = s / torch.where(nuclear > 0, nuclear, 1.0)[:, None]         # (n, m)
    top = pad(s[:, :TOP], (0, max(TOP - layer.m, 0)))                    # (n, 10)
    gaps = (top[:, :-1] - top[:, 1:]) / (top[:, :-1] + EPS)              # (n, 9)
    gaps[:, layer.m - 1:] = 0
    largest, smallest = s[:, 0], s[:, -1]
    floor = torch.maximum(smallest, 1e-6 * largest)
    condition = largest / torch.where(largest > 0, floor, 1.0)           # (n,)
    top_shares = pad(shares[:, :TOP], (0, max(TOP - layer.m, 0)))        # (n, 10)
    return columns(top, top_shares, gaps, torch.special.entr(shares).sum(1), condition, nuclear)


def matrix_norms(w: Tensor | Layer) -> Tensor:
    """Frobenius, nuclear, spectral, induced 1- and inf-norm (weight units); nuclear and spectral over Frobenius + EPS.

    The induced 1-norm is the largest column sum of absolute values, the induced inf-norm the largest row sum.
    (n, rows, cols) -> (n, 7).
    """
    layer = Layer.of(w)
    s, absolute = layer.singular_values, layer.w.abs()
    nuclear, largest = s.sum(1), s[:, 0]
    one = absolute.sum(1, dtype=torch.float64).amax(1)
    inf = absolute.sum(2, dtype=torch.float64).amax(1)
    scale = layer.frobenius + EPS
    return columns(layer.frobenius, nuclear, largest, one, inf, nuclear / scale, largest / scale)


def distribution(w: Tensor | Layer) -> Tensor:
    """Percentiles 5 10 25 50 75 90 95, p75-p25, mean |x - mean| (weight units); std/(|mean| + EPS), skewness, kurtosis.

    (n, rows, cols) -> (n, 12).
    """
    layer = Layer.of(w)
    p = layer.percentiles(5, 10, 25, 50, 75, 90, 95)                     # (n, 7)
    deviation = layer.central_sums[0] / layer.N
    variation = layer.std / (layer.mean.abs() + EPS)
    return columns(p, p[:, 4] - p[:, 2], deviation, variation, layer.skewness, layer.kurtosis)


def frequency(w: Tensor | Layer) -> Tensor:
    """Magnitudes of the unnormalised 2-D FFT, in weight units but for the last column. (n, rows, cols) -> (n, 14).

    The ten largest of all N bins (padded with 0), the mean, std (with N) and max of all N, and the share of the ten in
    the energy: sum of the ten squared / (sum of all squared + EPS), the latter N * sum(x^2) by Parseval's theorem.
    """
    layer = Layer.of(w)
    once, twice = layer.fft_magnitudes                                   # (n, a), (n, b)
    candidates = [once.topk(min(TOP, once.shape[1])).values]
    candidates.append(twice.topk(min(TOP, twice.shape[1])).values.repeat_interleave(2, dim=1))
    top = torch.cat(candidates, dim=1)
    top = top.topk(min(TOP, top.shape[1])).values                        # (n, 10 or N)
    top = pad(top, (0, TOP - top.shape[1]))                              # (n, 10)
    mean = (once.sum(1) + 2 * twice.sum(1)) / layer.N
    deviations = [((part - mean[:, None]) ** 2).sum(1) for part in (once, twice)]
    std = ((deviations[0] + 2 * deviations[1]) / layer.N).sqrt()
    share = (top**2).sum(1) / (layer.N * layer.sum_of_squares + EPS)
    return columns(top, mean, std, top[:, 0], share)


def info_theoretic(w: Tensor | Layer) -> Tensor:
    """Entropy (nats) of the 50-bin histogram over the matrix's own min..max, and the same over log 50 (0 to 1).

    Bins are closed below and open above, the last one closed, as NumPy's. (n, rows, cols) -> (n, 2).
    """
    layer = Layer.of(w)
    step = (layer.max - layer.min) / BINS                                # (n,)
    inner = torch.arange(1, BINS, dtype=torch.float64, device=step.device)
    edges = inner * step[:, None] + layer.min[:, None]                   # (n, 49)
    rounded = edges.float()                                              # x < edge just if x < the next float32 from edge up
    rounded = torch.where(rounded.double() < edges, rounded.nextafter(torch.full_like(rounded, math.inf)), rounded)
    below = torch.searchsorted(layer.sorted, rounded)                    # (n, 49) entries below each inner edge
    counts = pad(below, (0, 1), value=layer.N).diff(dim=1, prepend=torch.zeros_like(below[:, :1]))   # (n, 50)
    entropy = torch.special.entr(counts.double() / layer.N).sum(1)
    return columns(entropy, entropy / math.log(BINS))


def ensemble(w: Tensor | Layer) -> Tensor:
    """spectral, matrix_norms, distribution, frequency, info_theoretic side by side. (n, rows, cols) -> (n, 67)."""
    layer = Layer.of(w)
    return columns(*(REPRESENTATIONS[part](layer) for part in ENSEMBLE_PARTS))


REPRESENTATIONS = {
    "simple_stats": simple_stats,
    "rank_based": rank_based,
    "stats": stats,
    "spectral": spectral,
    "matrix_norms": matrix_norms,
    "distribution": distribution,
    "frequency": frequency,
    "info_theoretic": info_theoretic,
    "ensemble": ensemble,
}


def describe(w: Tensor, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Exception]]:
    """Several representations of one layer's batch (n, rows, cols), each (n, width); and the errors of those that failed.

    Works in slices of rows, so that what they share is computed once and stays near. Out of memory is the caller's to answer.
    """
    limit = SLICE_WEIGHTS["cpu" if w.device.type == "cpu" else "gpu"]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    failed: dict[str, Exception] = {}
    for part in w.split(max(1, limit // w[0].numel())):
        layer = Layer(part)
        for name in names:
            if name not in failed:
                try:
                    parts[name].append(REPRESENTATIONS[name](layer))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # the other representations of this layer go on; the caller reports it
                    if "ALLOC_FAILED" in str(error):                     # how cuFFT, cuBLAS and cuSOLVER say it
                        raise torch.OutOfMemoryError(str(error)) from error
                    failed[name] = error
    return {name: torch.cat(found) for name, found in parts.items() if name not in failed}, failed
