"""Kinds of adapter: which tensors a module has, and the `down` and `up` whose product is its change.

Every kind here is a product of two matrices exactly: no approximation is made. A kind that is none is refused
by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

FACTORED = 4  # a product of so many times smaller rank than its sizes is decomposed by its factors
LARGEST_SVD = 256  # rows or columns; above them the SVD takes seconds
GRAM_ZERO = 1e-7  # of the largest singular value

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # of a module's tensors, by role
Arrays = Mapping[str, np.ndarray]  # float64, by role


class BadFile(Exception):
    """Why a file cannot become a row, in one line."""


class Sizes(NamedTuple):
    """Of a module's change `scale * up @ down`."""

    outputs: int
    rank: int  # columns of `up`
    inputs: int  # columns of `down`; of a convolution in * height * width
    divisor: int | None  # alpha is divided by it; None where alpha does not count
    is_convolution: bool = False


class Kind(NamedTuple):
    """A kind of adapter. `sizes` raises BadFile for shapes that do not fit."""

    sizes: Callable[[Shapes], Sizes]
    factors: Callable[[Arrays], tuple[np.ndarray, np.ndarray]]  # (rank, inputs), (outputs, rank)


# --- LoRA, LoCon, AdaLoRA


def lora_sizes(shapes: Shapes) -> Sizes:
    """The shapes are (r, in, ...) and (out, r, 1, ...)."""
    down, up = shapes["down"], shapes["up"]
    if down[0] != up[1]:
        raise BadFile(f"`down` {list(down)} and `up` {list(up)} have different ranks")
    if any(size != 1 for size in up[2:]):
        raise BadFile(f"`up` has shape {list(up)}: an `up` convolution has kernel 1 x 1")
    return Sizes(up[0], up[1], math.prod(down[1:]), down[0], len(down) > 2)


def lora_factors(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """As they are."""
    return flat(arrays["down"]), flat(arrays["up"])


def locon_sizes(shapes: Shapes) -> Sizes:
    """A Tucker convolution: down (s, in, 1, 1), mid (r, s, kh, kw), up (out, r, 1, 1)."""
    down, mid, up = shapes["down"], shapes["mid"], shapes["up"]
    fit = len(mid) > 2 and mid[1] == down[0] and mid[0] == up[1]
    if not fit or any(size != 1 for size in (*down[2:], *up[2:])):
        raise BadFile(
            f"`down` {list(down)}, `mid` {list(mid)} and `up` {list(up)} are no convolution in three parts"
        )
    return Sizes(up[0], up[1], math.prod((down[1], *mid[2:])), down[0], True)


def locon_factors(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """`mid` is folded into `down`."""
    return tucker(arrays["mid"], flat(arrays["down"])), flat(arrays["up"])


def adalora_sizes(shapes: Shapes) -> Sizes:
    """The shapes are (r, in), (r, 1) for E, and (out, r). Alpha is divided by the rank before pruning."""
    sizes = lora_sizes(shapes)
    if math.prod(shapes["E"]) != sizes.rank:
        raise BadFile(f"`lora_E` {list(shapes['E'])} does not fit the rank {sizes.rank}")
    return sizes


def adalora_factors(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """The singular values E are folded into `up`."""
    return flat(arrays["down"]), flat(arrays["up"]) * arrays["E"].reshape(1, -1)


# --- LoHa: the product of two LoRAs, entry by entry


def loha_sizes(shapes: Shapes) -> Sizes:
    """w1_a (out, r), w1_b (r, in, ...), and w2 alike. With a core t1 (r, s, kh, kw): w1_a (r, out),
    w1_b (s, in).
    """
    halves = []
    for half in ("1", "2"):
        a, b, core = (shapes.get(f"hada_{name}") for name in (f"w{half}_a", f"w{half}_b", f"t{half}"))
        assert a is not None and b is not None  # `kind_of` has seen to it
        if core is None and a[1] == b[0]:
            halves.append((a[0], a[1], math.prod(b[1:])))
        elif core is not None and len(core) > 2 and core[:2] == (a[0], b[0]):
            halves.append((a[1], a[0], math.prod((b[1], *core[2:]))))
    if len(halves) < 2 or halves[0][0] != halves[1][0] or halves[0][2] != halves[1][2]:
        raise BadFile(f"its tensors do not fit together: {told(shapes)}")
    outputs, rank, inputs = halves[0]
    is_convolution = "hada_t1" in shapes
    return Sizes(outputs, rank * halves[1][1], inputs, shapes["hada_w1_b"][0], is_convolution)


def loha_factors(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(u1 @ d1) * (u2 @ d2) = up @ down, where up[o, ij] = u1[o, i] u2[o, j] and down[ij, x] = d1[i, x]
    d2[j, x] (the row-wise and the column-wise Khatri-Rao product).
    """
    (d1, u1), (d2, u2) = (factors_of_half(arrays, half) for half in ("1", "2"))
    up = (u1[:, :, None] * u2[:, None, :]).reshape(len(u1), -1)
    down = (d1[:, None, :] * d2[None, :, :]).reshape(-1, d1.shape[1])
    return down, up


def factors_of_half(arrays: Arrays, half: str) -> tuple[np.ndarray, np.ndarray]:
    """One of the two LoRAs of a LoHa."""
    a, b = arrays[f"hada_w{half}_a"], flat(arrays[f"hada_w{half}_b"])
    core = arrays.get(f"hada_t{half}")
    return (b, a) if core is None else (tucker(core, b), a.T)


# --- LoKr: a Kronecker product


class KroneckerFactor(NamedTuple):
    """One factor of a LoKr: whole, or a product of two."""

    rows: int
    rank: int
    cols: int
    decomposed: int | None  # what alpha is divided by, if it is a product


def lokr_sizes(shapes: Shapes) -> Sizes:
    """w1 (o1, i1) or w1_a (o1, r) w1_b (r, i1), and w2 (o2, i2, ...) likewise; t2 as in LoHa."""
    first, second = (factor_sizes(shapes, which) for which in ("1", "2"))
    # LyCORIS: the rank of w2 where that is a product, else that of w1; without either alpha does not count
    divisor = second.decomposed or first.decomposed
    is_convolution = "lokr_t2" in shapes or len(shapes.get("lokr_w2", ())) > 2
    return Sizes(
        first.rows * second.rows, first.rank * second.rank, first.cols * second.cols, divisor, is_convolution
    )


def factor_sizes(shapes: Shapes, which: str) -> KroneckerFactor:
    """Sizes of w1 or w2 as a matrix. Raises BadFile if its parts do not fit."""
    whole, a, b = (shapes.get(f"lokr_w{which}{part}") for part in ("", "_a", "_b"))
    core = shapes.get(f"lokr_t{which}")
    if whole is not None and len(whole) >= 2:
        rows, cols = whole[0], math.prod(whole[1:])
        return KroneckerFactor(rows, min(rows, cols), cols, None)
    if a is not None and b is not None:
        if core is None and a[1] == b[0]:
            return KroneckerFactor(a[0], a[1], math.prod(b[1:]), b[0])
        if core is not None and len(core) > 2 and core[:2] == (a[0], b[0]):
            return KroneckerFactor(a[1], a[0], math.prod((b[1], *core[2:])), b[0])
    raise BadFile(f"its tensors do not fit together: {told(shapes)}")


def lokr_factors(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """kron(u1 @ d1, u2 @ d2) = kron(u1, u2) @ kron(d1, d2); a whole factor is split by its SVD."""
    (d1, u1), (d2, u2) = (kronecker_factors(arrays, which) for which in ("1", "2"))
    return np.kron(d1, d2), np.kron(u1, u2)


def kronecker_factors(arrays: Arrays, which: str) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of w1 or w2."""
    whole = arrays.get(f"lokr_w{which}")
    if whole is not None:
        return balanced(flat(whole))
    a, b = arrays[f"lokr_w{which}_a"], flat(arrays[f"lokr_w{which}_b"])
    core = arrays.get(f"lokr_t{which}")
    return (b, a) if core is None else (tucker(core, b), a.T)


# --- shared


def flat(w: np.ndarray) -> np.ndarray:
    """(first, rest)."""
    return w.reshape(len(w), -1)


def tucker(core: np.ndarray, down: np.ndarray) -> np.ndarray:
    """(r, s, kh, kw) and (s, in) -> (r, in * kh * kw), the core folded into `down`."""
    return np.einsum("rs...,si->ri...", core, down).reshape(len(core), -1)


def balanced(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of min(rows, cols) each, with up @ down = matrix: the singular values' roots in both.

    The largest entry of each column of `up` is positive, so that the factors do not depend on the machine.
    """
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    roots = np.sqrt(s)
    return (signs * roots)[:, None] * v, u * (signs * roots)


def best_of_rank(down: np.ndarray, up: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The best approximation of up @ down by factors of a rank, zeros after their own rank; the squared
    Frobenius norm of what is lost, and of the product. Float64.

    Without the product where its rank is below its sizes: up @ down = q_up @ core @ q_down^T.
    """
    q_up, q_down = np.eye(0), np.eye(0)
    is_small = FACTORED * len(down) <= min(len(up), down.shape[1])
    if is_small:
        q_up, r_up = np.linalg.qr(up)
        q_down, r_down = np.linalg.qr(down.T)
        core = r_up @ r_down.T
    else:
        core = up @ down
    first_down, first_up, lost = leading(core, rank)
    if is_small:
        first_down, first_up = first_down @ q_down.T, q_up @ first_up
    kept = len(first_down)
    new_down, new_up = np.zeros((rank, down.shape[1])), np.zeros((len(up), rank))
    new_down[:kept], new_up[:, :kept] = first_down, first_up
    return new_down, new_up, lost, float((core**2).sum())


def leading(core: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The first `rank` rows and columns of `balanced`, or as many as there are, and the squared Frobenius
    norm of what they leave out.

    Above LARGEST_SVD by the eigenvectors of core @ core^T, which is 30 times faster; what is below GRAM_ZERO
    of the largest singular value cannot be told from rounding there, and is zero.
    """
    if max(core.shape) <= LARGEST_SVD:
        down, up = balanced(core)
        return (
            down[:rank],
            up[:, :rank],
            float(((down[rank:] ** 2).sum(1) * (up[:, rank:] ** 2).sum(0)).sum()),
        )
    from scipy.linalg import eigh

    size = len(core)
    kept = min(rank, *core.shape)
    _, u = eigh(core @ core.T, subset_by_index=[size - kept, size - 1])
    u = u[:, ::-1]
    u = u * np.sign(u[np.abs(u).argmax(0), np.arange(kept)])
    projected = u.T @ core
    s = np.linalg.norm(projected, axis=1)
    roots = np.sqrt(np.where(s > GRAM_ZERO * s[0], s, 0))
    inverse = np.divide(1, roots, out=np.zeros(kept), where=roots > 0)
    return projected * inverse[:, None], u * roots, max(float((core**2).sum() - (roots**4).sum()), 0.0)


def told(shapes: Shapes) -> str:
    """The shapes of tensors, for a message."""
    return ", ".join(f"{role} {list(shape)}" for role, shape in sorted(shapes.items()))


KINDS = {
    "LoRA": Kind(lora_sizes, lora_factors),
    "LoCon": Kind(locon_sizes, locon_factors),
    "AdaLoRA": Kind(adalora_sizes, adalora_factors),
    "LoHa": Kind(loha_sizes, loha_factors),
    "LoKr": Kind(lokr_sizes, lokr_factors),
}
SCALARS = {"alpha", "ranknum"}
BESIDE = {*SCALARS, "magnitude"}  # roles of tensors that a module of any kind may have


def kind_of(roles: set[str]) -> str:
    """The name of a module's kind. Raises BadFile if tensors are missing, or of several kinds."""
    own = roles - BESIDE
    if own <= {"down", "up", "mid", "E"}:
        name = "AdaLoRA" if "E" in own else "LoCon" if "mid" in own else "LoRA"
        needed = {"down", "up", *({"E"} & own), *({"mid"} & own)}
        if {"E", "mid"} <= own:
            raise BadFile("has both `mid` and `lora_E`: no known kind of adapter has")
    elif all(role.startswith("hada_") for role in own):
        name, needed = "LoHa", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
        needed |= {"hada_t1", "hada_t2"} if own & {"hada_t1", "hada_t2"} else set()
    elif all(role.startswith("lokr_") for role in own):
        name, needed = "LoKr", set()
        for which in ("1", "2"):
            parts = {f"lokr_w{which}_a", f"lokr_w{which}_b"}
            needed |= {f"lokr_w{which}"} if f"lokr_w{which}" in own else parts
        needed |= {"lokr_t2"} & own
    else:
        raise BadFile(f"has tensors of several kinds of adapter: {', '.join(sorted(own))}")
    if own != needed:
        missing, surplus = sorted(needed - own), sorted(own - needed)
        raise BadFile(
            f"has no `{missing[0]}`" if missing else f"has a `{surplus[0]}` that does not belong to a {name}"
        )
    return name


# --- kinds that are refused


class RefusedKind(NamedTuple):
    """A kind that `up @ down` does not describe. `pattern` matches the end of a tensor's name."""

    name: str
    pattern: str


REFUSED_KINDS = (
    RefusedKind("OFT or BOFT adapters (rotations)", r"[._](oft|boft)_(blocks|diag|R|s|r)\b[^/]*"),
    RefusedKind("(IA)3 adapters (factors of activations)", r"(ia3_l\b[^/]*|\.on_input)"),
    RefusedKind(
        "VeRA adapters (whose shared matrices are cut to each layer)", r"vera_(lambda_[bd]|A|B)\b[^/]*"
    ),
    RefusedKind("GLoRA adapters", r"\.(a1|a2|b1|b2)\.weight"),
    RefusedKind("changes of whole matrices (diff)", r"\.diff"),
    RefusedKind(
        "whole weights (modules_to_save)",
        r"(\.modules_to_save\..+|^base_model\.model\.(?!.*\.lora_)(?!.*norm).+\.(weight|bias))",
    ),
    RefusedKind("changes of biases", r"(\.diff_b|\.bias|\.bias_(values|indices|size))"),
    RefusedKind("changes of norms", r"(\.w_norm|\.b_norm|norm\w*\.weight)"),
    RefusedKind("adapters of embeddings", r"lora_embedding_[AB]\b[^/]*"),
    RefusedKind(
        "embeddings of words (textual inversion)",
        r"(clip_l|clip_g|t5xxl|emb_params|bundle_emb\..+|string_to_param.*)",
    ),
    RefusedKind("FourierFT, RandLoRA or HRA adapters", r"(fourierft_spectrum|randlora_\w+|hra_u)\b[^/]*"),
)


def refused_kind(key: str) -> RefusedKind | None:
    """The kind of adapter that a tensor belongs to, if it is one that is refused."""
    return next((kind for kind in REFUSED_KINDS if re.fullmatch(rf"(.*?){kind.pattern}", key)), None)
