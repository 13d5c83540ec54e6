"""What numbers describe a batch of matrices (the nine), and a batch of modules by their products (six more).

Each of the nine is a pure function (n, rows, cols) float32 -> (n, width) float32 on the same device: row i of
the result depends on matrix i alone. N = rows*cols, m = min(rows, cols); x is a matrix as a vector of its N
entries. Sums run in float64. Definitions follow the project's design, section 5: percentiles interpolate
linearly, the median is the lower middle value, skewness and kurtosis are standardised moments (kurtosis of a
normal sample is about 3, not 0), entropies are in nats, s_1 >= s_2 >= ... are the singular values. A constant
matrix has std, skewness, kurtosis and histogram entropy 0.

Those of the product take `down` (n, r, in) and `up` (n, out, r) and describe W = up @ down, (out, in), which
is what the adapter does to the model: (up G, inv(G) down) is the same adapter for every invertible G. W is
never formed: all of it follows from sums over `in` and `out` of at most r^2 (the fourth moment: r^4) terms.

(Over 400 lines, because a definition stands beside the sums and singular values that it shares with others.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

EPS = 1e-8
TOP = 10  # singular values and FFT magnitudes kept
BINS = 50  # of the histogram behind info_theoretic
EIGH_BATCH = 16_384  # matrices a call: cuSOLVER fails on larger batches
# Weights described at a time. On a CPU shorter slices stay in a core's cache, but the threads of Python wait
# for each other between operations, which costs more.
SLICE_WEIGHTS = {"cpu": 2**19, "gpu": 2**24}
# The same of modules, whose many small operations want longer slices.
SLICE_PRODUCTS = {"cpu": 2**20, "gpu": 2**24}
GRAM_IS_EXACT_ABOVE = 1e-4  # of s_m/s_1: below it, squaring loses more than half of float64's digits
SKETCH_SIZE = 16  # rows and columns of the product's sketch
PROJECTED = 16  # numbers that a singular vector of the product is projected to
DIRECTIONS = 4  # pairs of singular vectors kept
PROJECTION_SEED = 0
NORM_PERCENTS = (0, 5, 10, 25, 50, 75, 90, 95, 100)


class LayerBatch:
    """A batch of matrices with the intermediate results that
    several representations share, each computed once.
    """

    def __init__(self, w: Tensor):
        if w.ndim != 3 or 0 in w.shape:
            raise ValueError(f"expected a non-empty batch (n, rows, cols), got {tuple(w.shape)}")
        self.w = w.float()  # (n, rows, cols)
        self.x = self.w.flatten(1)  # (n, N)
        self.N = self.x.shape[1]
        self.m = min(w.shape[1:])

    @classmethod
    def of(cls, w: Tensor | LayerBatch) -> LayerBatch:
        """The batch itself, or a batch made of matrices (n, rows, cols)."""
        return w if isinstance(w, LayerBatch) else cls(w)

    @cached_property
    def sorted(self) -> Tensor:
        """Entries ascending."""
        return sort(self.x)  # (n, N)

    @cached_property
    def min(self) -> Tensor:
        """Smallest entry."""
        return self.sorted[:, 0].double()  # (n,)

    @cached_property
    def max(self) -> Tensor:
        """Largest entry."""
        return self.sorted[:, -1].double()  # (n,)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the entries."""
        # (n,) exact for a constant: 24 bits times N fit, so its std is 0.
        return self.x.sum(1, dtype=torch.float64) / self.N

    @cached_property
    def centred(self) -> Tensor:
        """Entries less their mean."""
        return self.x.double() - self.mean[:, None]  # (n, N)

    @cached_property
    def central_sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the entries of |d|, d^2, d^3 and d^4 with d = x - mean; (n,) each, float64."""
        d = self.centred
        d2 = d * d  # (n, N)
        return d.abs().sum(1), d2.sum(1), torch.linalg.vecdot(d2, d), torch.linalg.vecdot(d2, d2)

    @cached_property
    def std(self) -> Tensor:
        """With N-1; 0 for one element."""
        return (self.central_sums[1] / max(self.N - 1, 1)).sqrt()  # (n,)

    @cached_property
    def skewness(self) -> Tensor:
        """Third standardised moment."""
        return self.central_sums[2] / self.N / (self.std + EPS) ** 3  # (n,)

    @cached_property
    def kurtosis(self) -> Tensor:
        """Fourth standardised moment, not excess."""
        return self.central_sums[3] / self.N / (self.std + EPS) ** 4  # (n,)

    @cached_property
    def sum_of_squares(self) -> Tensor:
        """Sum of the squared entries."""
        return self.central_sums[1] + self.N * self.mean**2  # (n,)

    @cached_property
    def frobenius(self) -> Tensor:
        """Frobenius norm."""
        return self.sum_of_squares.sqrt()  # (n,)

    @cached_property
    def singular_values(self) -> Tensor:
        """All m of each matrix, descending, float64.

        Square roots of the eigenvalues of the float64 Gram matrix of the shorter side. An eigenvalue is good
        to 1e-16 s_1^2, so ill-conditioned matrices (a LoRA of less than its nominal rank) are done again by a
        float64 SVD.
        """
        if self.m == 1:
            return self.frobenius[:, None]  # (n, 1)
        rows, cols = self.w.shape[1:]
        wide = (self.w if rows <= cols else self.w.mT).double()  # (n, m, longer side)
        gram = wide @ wide.mT  # (n, m, m)
        eigenvalues = torch.cat([torch.linalg.eigvalsh(part) for part in gram.split(EIGH_BATCH)])
        s = eigenvalues.clamp_min(0).sqrt().flip(1)  # (n, m)
        ill = s[:, -1] < GRAM_IS_EXACT_ABOVE * s[:, 0]
        if not s.is_meta and ill.any():  # which rows: a question of values, not of shapes
            s[ill] = torch.linalg.svdvals(wide[ill])
        return s

    @cached_property
    def fft_magnitudes(self) -> tuple[Tensor, Tensor]:
        """|2-D FFT|, unnormalised: the bins that stand once,
        and those whose mirror image stands for a second one.

        The FFT of a real matrix is conjugate-symmetric, so half of it is computed; along the longer side,
        because the magnitudes of a transposed matrix are the same. In float64: a strong wave's float32
        rounding would drown the other bins. The mean, which shows in bin (0, 0) alone, is put back after, so
        that a constant has zeros elsewhere. (n, a) and (n, b) float64 with a + 2b = N.
        """
        rows, cols = self.w.shape[1:]
        centred = self.centred.view_as(self.w)
        wide = centred if rows <= cols else centred.mT
        half = torch.fft.rfft2(wide).abs()  # (n, m, longer // 2 + 1)
        half[:, 0, 0] = self.N * self.mean.abs()
        longer = wide.shape[2]
        mirrored = slice(1, (longer + 1) // 2)
        once = [0] if longer % 2 else [0, longer // 2]
        return half[:, :, once].flatten(1), half[:, :, mirrored].flatten(1)

    @cached_property
    def percentiles(self) -> Tensor:
        """1 5 10 25 50 75 90 95 99, float64."""
        return percentiles_of(self.sorted, (1, 5, 10, 25, 50, 75, 90, 95, 99))  # (n, 9)


# --- what NumPy does faster on a CPU, by SIMD, and torch does on another device


def sort(x: Tensor) -> Tensor:
    """Rows ascending."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    return torch.from_numpy(np.sort(x.detach().numpy(), axis=1))


def largest(x: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each row (n, N), descending; all N if there are fewer."""
    first = x.shape[1] - min(count, x.shape[1])
    if x.device.type != "cpu":
        return x.topk(x.shape[1] - first).values
    return sort(torch.from_numpy(np.partition(x.detach().numpy(), first, axis=1)[:, first:])).flip(1)


def percentiles_of(ascending: Tensor, percents: tuple[float, ...]) -> Tensor:
    """Of each row (n, N) of ascending numbers, linearly interpolated: (n, len(percents)) float64."""
    positions = [percent / 100 * (ascending.shape[1] - 1) for percent in percents]
    below = ascending[:, [math.floor(p) for p in positions]].double()
    above = ascending[:, [math.ceil(p) for p in positions]].double()
    fraction = torch.tensor(
        [p - math.floor(p) for p in positions], dtype=torch.float64, device=ascending.device
    )
    return below + (above - below) * fraction


def columns(*parts: Tensor) -> Tensor:
    """Side by side as float32; a part is one column (n,) or several (n, k)."""
    return torch.cat([part[:, None] if part.ndim == 1 else part for part in parts], dim=1).float()


def simple_stats(w: Tensor | LayerBatch) -> Tensor:
    """Frobenius norm, mean, std, max, min, in weight units. (n, rows, cols) -> (n, 5)."""
    layer = LayerBatch.of(w)
    return columns(layer.frobenius, layer.mean, layer.std, layer.max, layer.min)


def rank_based(w: Tensor | LayerBatch) -> Tensor:
    """Percentiles 1 5 10 25 50 75 90 95 99, p75-p25, p99-p1, in weight units. (n, rows, cols) -> (n, 11)."""
    p = LayerBatch.of(w).percentiles  # (n, 9)
    return columns(p, p[:, 5] - p[:, 3], p[:, 8] - p[:, 0])


def stats(w: Tensor | LayerBatch) -> Tensor:
    """Mean, std, median (lower middle value), min, max in weight units;
    skewness, kurtosis. (n, rows, cols) -> (n, 7).
    """
    layer = LayerBatch.of(w)
    median = layer.sorted[:, (layer.N - 1) // 2].double()
    return columns(layer.mean, layer.std, median, layer.min, layer.max, layer.skewness, layer.kurtosis)


def spectral(w: Tensor | LayerBatch) -> Tensor:
    """Profile of the singular values. (n, rows, cols) -> (n, 32).

    s_1..s_10 (weight units, padded with 0); their shares s_i/sum(s); nine gaps (s_i - s_{i+1})/(s_i + EPS), 0
    for i >= m; entropy of the shares (nats); condition number s_1/max(s_m, 1e-6 s_1); nuclear norm. Shares,
    entropy and nuclear norm use all m values. A zero matrix has shares, entropy and condition number 0.
    """
    return spectral_profile(LayerBatch.of(w).singular_values)


def spectral_profile(s: Tensor) -> Tensor:
    """The 32 columns of `spectral` from all singular values (n, m), descending."""
    m = s.shape[1]
    nuclear = s.sum(1)  # (n,)
    shares = s / torch.where(nuclear > 0, nuclear, 1.0)[:, None]  # (n, m)
    top = pad(s[:, :TOP], (0, max(TOP - m, 0)))  # (n, 10)
    gaps = (top[:, :-1] - top[:, 1:]) / (top[:, :-1] + EPS)  # (n, 9)
    gaps[:, m - 1 :] = 0
    largest, smallest = s[:, 0], s[:, -1]
    floor = torch.maximum(smallest, 1e-6 * largest)
    condition = largest / torch.where(largest > 0, floor, 1.0)  # (n,)
    top_shares = pad(shares[:, :TOP], (0, max(TOP - m, 0)))  # (n, 10)
    return columns(top, top_shares, gaps, torch.special.entr(shares).sum(1), condition, nuclear)


def matrix_norms(w: Tensor | LayerBatch) -> Tensor:
    """Frobenius, nuclear, spectral, induced 1- and inf-norm (weight units);
    nuclear and spectral over Frobenius + EPS.

    The induced 1-norm is the largest column sum of absolute values, the induced inf-norm the largest row sum.
    (n, rows, cols) -> (n, 7).
    """
    layer = LayerBatch.of(w)
    s, absolute = layer.singular_values, layer.w.abs()
    nuclear, s_1 = s.sum(1), s[:, 0]
    one, inf = largest_sum(absolute, 1), largest_sum(absolute, 2)
    scale = layer.frobenius + EPS
    return columns(layer.frobenius, nuclear, s_1, one, inf, nuclear / scale, s_1 / scale)


def largest_sum(w: Tensor, dim: int) -> Tensor:
    """The largest of each matrix's sums along an axis. (n, rows, cols) -> (n,) float64."""
    if w.shape[dim] == 1:  # sums of one entry
        return w.flatten(1).amax(1).double()
    return w.sum(dim, dtype=torch.float64).amax(1)


def distribution(w: Tensor | LayerBatch) -> Tensor:
    """Percentiles 5 10 25 50 75 90 95, p75-p25, mean |x - mean| (weight units);
    std/(|mean| + EPS), skewness, kurtosis.

    (n, rows, cols) -> (n, 12).
    """
    layer = LayerBatch.of(w)
    p = layer.percentiles[:, 1:-1]  # (n, 7)
    deviation = layer.central_sums[0] / layer.N
    variation = layer.std / (layer.mean.abs() + EPS)
    return columns(p, p[:, 4] - p[:, 2], deviation, variation, layer.skewness, layer.kurtosis)


def frequency(w: Tensor | LayerBatch) -> Tensor:
    """Magnitudes of the unnormalised 2-D FFT, in weight units but for the last column.
    (n, rows, cols) -> (n, 14).

    The ten largest of all N bins (padded with 0), the mean, std (with N) and max of all N, and the share of
    the ten in the energy: sum of the ten squared / (sum of all squared + EPS), the latter N * sum(x^2) by
    Parseval's theorem.
    """
    layer = LayerBatch.of(w)
    once, twice = layer.fft_magnitudes  # (n, a), (n, b)
    candidates = (largest(once, TOP), largest(twice, TOP).repeat_interleave(2, dim=1))
    top = largest(torch.cat(candidates, dim=1), TOP)  # (n, 10 or N)
    top = pad(top, (0, TOP - top.shape[1]))  # (n, 10)
    mean = (once.sum(1) + 2 * twice.sum(1)) / layer.N
    deviations = [((part - mean[:, None]) ** 2).sum(1) for part in (once, twice)]
    std = ((deviations[0] + 2 * deviations[1]) / layer.N).sqrt()
    share = (top**2).sum(1) / (layer.N * layer.sum_of_squares + EPS)
    return columns(top, mean, std, top[:, 0], share)


def info_theoretic(w: Tensor | LayerBatch) -> Tensor:
    """Entropy (nats) of the 50-bin histogram over the matrix's own min..max,
    and the same over log 50 (0 to 1).

    Bins are closed below and open above, the last one closed, as NumPy's. (n, rows, cols) -> (n, 2).
    """
    layer = LayerBatch.of(w)
    step = (layer.max - layer.min) / BINS  # (n,)
    inner = torch.arange(1, BINS, dtype=torch.float64, device=step.device)
    edges = inner * step[:, None] + layer.min[:, None]  # (n, 49)
    rounded = edges.float()  # x < edge just if x < the next float32 from edge up
    rounded = torch.where(
        rounded.double() < edges, rounded.nextafter(torch.full_like(rounded, math.inf)), rounded
    )
    below = torch.searchsorted(layer.sorted, rounded)  # (n, 49) entries below each inner edge
    counts = pad(below, (0, 1), value=layer.N).diff(dim=1, prepend=torch.zeros_like(below[:, :1]))  # (n, 50)
    entropy = torch.special.entr(counts.double() / layer.N).sum(1)
    return columns(entropy, entropy / math.log(BINS))


def ensemble(w: Tensor | LayerBatch) -> Tensor:
    """spectral, matrix_norms, distribution, frequency, info_theoretic side by side.
    (n, rows, cols) -> (n, 67).
    """
    layer = LayerBatch.of(w)
    parts = (spectral, matrix_norms, distribution, frequency, info_theoretic)
    return columns(*(part(layer) for part in parts))


# --- of the product


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, r), ascending, and eigenvectors (n, r, r) as columns."""
    parts = [torch.linalg.eigh(part) for part in symmetric.split(EIGH_BATCH)]
    return torch.cat([values for values, _ in parts]), torch.cat([vectors for _, vectors in parts])


@cache
def projection(count: int, size: int, side: str, device: torch.device) -> Tensor:
    """Fixed Gaussian numbers (count, size) float64, with std 1, for vectors of a side; a larger count begins
    with the smaller one's rows.
    """
    rng = np.random.default_rng([PROJECTION_SEED, *side.encode(), size])
    return torch.from_numpy(rng.standard_normal((count, size))).to(device)


class ModuleBatch:
    """A batch of pairs `down` (n, r, in), `up` (n, out, r) with what several representations of W = up @ down
    share, each computed once.
    """

    def __init__(self, down: Tensor, up: Tensor, sketch_size: int = SKETCH_SIZE):
        if (
            down.ndim != 3
            or up.ndim != 3
            or 0 in (*down.shape, *up.shape)
            or down.shape[:2] != (len(up), up.shape[2])
        ):
            raise ValueError(
                f"expected down (n, r, in) and up (n, out, r), got {tuple(down.shape)} and {tuple(up.shape)}"
            )
        self.down = down.double()
        self.upT = up.mT.double().contiguous()  # (n, r, out): sums along memory
        self.up = self.upT.mT
        self.r, self.sketch_size = down.shape[1], sketch_size
        self.N = up.shape[1] * down.shape[2]  # entries of W
        self.m = min(self.r, up.shape[1], down.shape[2])  # singular values that need not be 0

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """Down @ down.mT and up.mT @ up, (n, r, r) each."""
        return self.down @ self.down.mT, self.upT @ self.up

    @cached_property
    def svd_of_grams(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S (n, r), descending; left and right (n, r, r);
        and which rows (n,) are too ill-conditioned for this way.

        up @ left has the left singular vectors as columns, right @ down the right ones as rows: with the
        eigenvectors E of down @ down.mT and C = E sqrt(eigenvalues), inv(C) @ down has orthonormal rows, and
        the Gram matrix of up @ C has the squares of W's singular values.
        """
        gram_down, gram_up = self.grams
        values, vectors = eigh(gram_down)
        roots = values.clamp_min(0).sqrt()  # (n, r) ascending
        C = vectors * roots[:, None]
        inverse = vectors.mT / torch.where(roots > 0, roots, 1.0)[:, :, None]
        squares, turn = eigh(C.mT @ gram_up @ C)
        s, turn = squares.clamp_min(0).sqrt().flip(1), turn.flip(2)
        left = C @ turn / torch.where(s > 0, s, 1.0)[:, None]
        ill = (roots[:, 0] <= GRAM_IS_EXACT_ABOVE * roots[:, -1]) | (
            s[:, -1] <= GRAM_IS_EXACT_ABOVE * s[:, 0]
        )
        return s, left, turn.mT @ inverse, ill

    @cached_property
    def svd_of_ill(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """U (k, out, r), s (k, r) and V (k, r, in) of the ill-conditioned rows, or None;
        what is beyond m is 0.

        By the QR factors of both sides and the SVD of the small matrix between them.
        """
        ill = self.svd_of_grams[3]
        if ill.is_meta or not ill.any():  # which rows: a question of values, not of shapes
            return None
        q_up, r_up = torch.linalg.qr(self.up[ill])
        q_down, r_down = torch.linalg.qr(self.down[ill].mT)
        x, s, y = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
        missing = self.r - s.shape[1]
        return pad(q_up @ x, (0, missing)), pad(s, (0, missing)), pad(y @ q_down.mT, (0, 0, 0, missing))

    @cached_property
    def singular_values(self) -> Tensor:
        """The m that need not be 0, descending, (n, m) float64."""
        s, _, _, ill = self.svd_of_grams
        if self.svd_of_ill is not None:
            s = s.index_put((ill,), self.svd_of_ill[1])
        return s[:, : self.m]

    @cached_property
    def row_norms(self) -> Tensor:
        """Norms of the rows of W, (n, out)."""
        return ((self.grams[0] @ self.upT) * self.upT).sum(1).clamp_min(0).sqrt()

    @cached_property
    def column_norms(self) -> Tensor:
        """Of the columns of W, (n, in)."""
        return ((self.grams[1] @ self.down) * self.down).sum(1).clamp_min(0).sqrt()

    @cached_property
    def projections(self) -> tuple[Tensor, Tensor]:
        """R_out (k, out) and R_in (k, in); the first PROJECTED are the same for every k."""
        count, device = max(PROJECTED, self.sketch_size), self.up.device
        return projection(count, self.up.shape[1], "out", device), projection(
            count, self.down.shape[2], "in", device
        )

    @cached_property
    def projected(self) -> tuple[Tensor, Tensor]:
        """R_out @ up (n, k, r) and down @ R_in.mT (n, r, k)."""
        return self.projections[0] @ self.up, self.down @ self.projections[1].mT

    def directions(self, count: int, whole: bool = False) -> tuple[Tensor, Tensor]:
        """The first `count` left and right singular vectors times sqrt(s_i), by their PROJECTED projections:
        (n, count, PROJECTED) each.

        Whole, (n, count, out) and (n, count, in), with `whole`. Of all pairs (up G, inv(G) down) they are the
        balanced one: r of them are an `up` and a `down` again. The sign of a pair is such that the projection
        of the left vector that is largest in absolute value is positive. What is beyond m is 0.
        """
        R_out, R_in = (R[:PROJECTED] for R in self.projections)
        s, left, right, ill = self.svd_of_grams
        scale = s.sqrt()[:, None]  # (n, 1, r)
        probes = self.projected[0][:, :PROJECTED] @ left * scale  # (n, PROJECTED, r)
        u = self.up @ left * scale if whole else probes  # (n, out or PROJECTED, r)
        # (n, r, in or PROJECTED)
        v = right @ (self.down if whole else self.projected[1][:, :, :PROJECTED]) * scale.mT
        if self.svd_of_ill is not None:
            U, s_ill, V = self.svd_of_ill
            U, V = U * s_ill.sqrt()[:, None], V * s_ill.sqrt()[:, :, None]
            probes = probes.index_put((ill,), R_out @ U)
            u = u.index_put((ill,), U if whole else R_out @ U)
            v = v.index_put((ill,), V if whole else V @ R_in.mT)
        largest = probes.gather(1, probes.abs().argmax(1, keepdim=True))  # (n, 1, r)
        sign = torch.where(largest < 0, -1.0, 1.0)
        missing = max(count - self.r, 0)
        return pad((u * sign).mT[:, :count], (0, 0, 0, missing)), pad(
            (v * sign.mT)[:, :count], (0, 0, 0, missing)
        )


def product_spectral(module: ModuleBatch) -> Tensor:
    """Profile of W's singular values, the columns of `spectral`,
    of the m = min(r, out, in) that need not be 0. (n, 32).

    Singular values of up, down and product are what DSiRe uses; these do not see how the product is shared
    between the two.
    """
    return spectral_profile(module.singular_values)


def product_norms(module: ModuleBatch) -> Tensor:
    """Frobenius, nuclear, spectral norm, largest row and largest column norm of W (weights squared); nuclear
    and spectral over Frobenius. (n, 7).

    The ratios are 0 for a zero product. Largest row and column norm are the induced norms 2 -> inf and 1 ->
    2.
    """
    s = module.singular_values  # (n, m)
    frobenius, nuclear, largest = s.norm(dim=1), s.sum(1), s[:, 0]
    scale = torch.where(frobenius > 0, frobenius, 1.0)
    return columns(
        frobenius,
        nuclear,
        largest,
        module.row_norms.amax(1),
        module.column_norms.amax(1),
        nuclear / scale,
        largest / scale,
    )


def product_moments(module: ModuleBatch) -> Tensor:
    """Means of w, w^2, w^3 and w^4 over the entries w of W, raw. (n, 4).

    W^2 (entry by entry) is a product too, of the r (r + 1) / 2 products of two columns of `up` with those of
    two rows of `down`, twice where the two differ. So mean w^4 = |W^2|_F^2 / N and mean w^3 = <W^2, W> / N
    follow from Gram matrices.
    """
    up, down, N = module.upT, module.down, module.N  # (n, r, out), (n, r, in)
    first, second = torch.triu_indices(module.r, module.r, device=up.device)
    times = torch.where(first == second, 1.0, 2.0).to(up)  # (p,) with p = r (r + 1) / 2
    up2, down2 = up[:, first] * up[:, second], down[:, first] * down[:, second]  # (n, p, out), (n, p, in)
    one = torch.linalg.vecdot(up.sum(2), down.sum(2))
    two = (module.grams[0] * module.grams[1]).sum((1, 2))
    three = ((up2 @ up.mT) * (down2 @ down.mT) * times[:, None]).sum((1, 2))
    four = ((up2 @ up2.mT) * (down2 @ down2.mT) * times[:, None] * times).sum((1, 2))
    return columns(one / N, two / N, three / N, four / N)


def product_quantiles(module: ModuleBatch) -> Tensor:
    """Percentiles 0 5 10 25 50 75 90 95 100 of the norms of W's rows,
    then of its columns, linearly interpolated. (n, 18).

    Which output, or input, channels the adapter writes to, or reads from, and how unequally. Units: weights
    squared.
    """
    return columns(
        *(percentiles_of(sort(norms), NORM_PERCENTS) for norms in (module.row_norms, module.column_norms))
    )


def product_sketch(module: ModuleBatch) -> Tensor:
    """R_out @ W @ R_in.mT with fixed Gaussian R_out (k, out) and R_in (k, in), row by row.
    (n, k^2), k = 16 unless told.

    A linear map of W that keeps inner products on average (Johnson and Lindenstrauss): a classifier on it
    sees the direction of the adapter. MVProbe learns such probes; these are the same for every module of a
    shape, row and run.
    """
    k = module.sketch_size
    left, right = module.projected
    return columns((left[:, :k] @ right[:, :, :k]).flatten(1))


def product_directions(module: ModuleBatch) -> Tensor:
    """The four first left singular vectors of W, then the right ones,
    times sqrt(s_i), each by 16 fixed projections. (n, 128).

    The balanced factors by QR and SVD that W2T reads, signs fixed (`ModuleBatch.directions`); 0
    beyond rank r. Units: weights.
    """
    left, right = module.directions(DIRECTIONS)
    return columns(left.flatten(1), right.flatten(1))


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
PRODUCT_REPRESENTATIONS = {
    "product_spectral": product_spectral,
    "product_norms": product_norms,
    "product_moments": product_moments,
    "product_quantiles": product_quantiles,
    "product_sketch": product_sketch,
    "product_directions": product_directions,
}


def function_of(name: str) -> Callable:
    """The function that computes a representation:
    that of the two registries, or of this module by its name.
    """
    registered: dict[str, Callable] = {**REPRESENTATIONS, **PRODUCT_REPRESENTATIONS}
    return registered[name] if name in registered else globals()[name]


def describe(w: Tensor, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Exception]]:
    """Several representations of one layer's batch (n, rows, cols),
    each (n, width); and the errors of those that failed.

    Works in slices of rows, so that what they share is computed once and stays near. Out of memory is the
    caller's to answer.
    """
    limit = SLICE_WEIGHTS["cpu" if w.device.type == "cpu" else "gpu"]
    return in_slices((w,), limit // w[0].numel(), LayerBatch, {name: function_of(name) for name in names})


def describe_module(
    down: Tensor, up: Tensor, names: list[str], sketch_size: int = SKETCH_SIZE
) -> tuple[dict[str, Tensor], dict[str, Exception]]:
    """Several representations of the products of one module's batch, and the errors of those that failed.

    The factors are `down` (n, r, in) and `up` (n, out, r).
    """
    limit = SLICE_PRODUCTS["cpu" if down.device.type == "cpu" else "gpu"]
    # Numbers a row: the pairs of columns behind the fourth moment.
    size = (down[0].numel() + up[0].numel()) * (down.shape[1] + 1) // 2
    return in_slices(
        (down, up),
        limit // size,
        lambda part_down, part_up: ModuleBatch(part_down, part_up, sketch_size),
        {name: function_of(name) for name in names},
    )


def in_slices(
    weights: tuple[Tensor, ...], rows: int, share: Callable, functions: dict[str, Callable]
) -> tuple[dict[str, Tensor], dict[str, Exception]]:
    """Each function of `share(*part)` for parts of `rows` rows of every tensor, at least one."""
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    failed: dict[str, Exception] = {}
    for part in zip(*(w.split(max(1, rows)) for w in weights), strict=True):
        shared = share(*part)
        for name, function in functions.items():
            if name not in failed:
                try:
                    parts[name].append(function(shared))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # the other representations go on; the caller reports it
                    if "ALLOC_FAILED" in str(error):  # how cuFFT, cuBLAS and cuSOLVER say it
                        raise torch.OutOfMemoryError(str(error)) from error
                    failed[name] = error
    return {name: torch.cat(found) for name, found in parts.items() if name not in failed}, failed
