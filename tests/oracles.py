"""Slow, obvious twins of the fast code: float64,
one matrix or one model at a time, written from the definitions.
"""

import math

import numpy as np
import scipy.stats
import torch
from torch import nn

EPS = 1e-8


def standardised_moment(x, power):
    if x.max() == x.min():
        return 0.0
    std = x.std(ddof=1)
    return np.mean(((x - x.mean()) / (std + EPS)) ** power)


def sample_std(x):
    return 0.0 if x.size == 1 or x.max() == x.min() else x.std(ddof=1)


def simple_stats(w):
    x = w.ravel()
    return [np.linalg.norm(w), x.mean(), sample_std(x), x.max(), x.min()]


def rank_based(w):
    p = dict(zip(q := (1, 5, 10, 25, 50, 75, 90, 95, 99), np.percentile(w, q), strict=True))
    return [*p.values(), p[75] - p[25], p[99] - p[1]]


def stats(w):
    x = np.sort(w.ravel())
    median = x[(x.size - 1) // 2]
    return [
        x.mean(),
        sample_std(x),
        median,
        x.min(),
        x.max(),
        standardised_moment(x, 3),
        standardised_moment(x, 4),
    ]


def spectral(w):
    s = np.linalg.svd(w, compute_uv=False)
    total = s.sum()
    shares = s / total if total > 0 else np.zeros_like(s)
    gaps = []
    for i in range(1, 10):
        gaps.append((s[i - 1] - s[i]) / (s[i - 1] + EPS) if i < len(s) else 0.0)
    condition = s[0] / max(s[-1], 1e-6 * s[0]) if s[0] > 0 else 0.0
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    first_ten = [s[i] if i < len(s) else 0.0 for i in range(10)]
    ten_shares = [shares[i] if i < len(s) else 0.0 for i in range(10)]
    return [*first_ten, *ten_shares, *gaps, entropy, condition, total]


def matrix_norms(w):
    frobenius, nuclear, spectral_norm = (np.linalg.norm(w, kind) for kind in ("fro", "nuc", 2))
    one, inf = np.linalg.norm(w, 1), np.linalg.norm(w, np.inf)
    return [
        frobenius,
        nuclear,
        spectral_norm,
        one,
        inf,
        nuclear / (frobenius + EPS),
        spectral_norm / (frobenius + EPS),
    ]


def distribution(w):
    x = w.ravel()
    p = np.percentile(x, (5, 10, 25, 50, 75, 90, 95))
    constant = x.max() == x.min()
    deviation = 0.0 if constant else np.abs(x - x.mean()).mean()
    return [
        *p,
        p[4] - p[2],
        deviation,
        sample_std(x) / (abs(x.mean()) + EPS),
        standardised_moment(x, 3),
        standardised_moment(x, 4),
    ]


def frequency(w):
    magnitudes = np.abs(np.fft.fft2(w)).ravel()
    top = np.zeros(10)
    largest = np.sort(magnitudes)[::-1][:10]
    top[: len(largest)] = largest
    share = (top**2).sum() / ((magnitudes**2).sum() + EPS)
    return [*top, magnitudes.mean(), magnitudes.std(ddof=0), magnitudes.max(), share]


def info_theoretic(w):
    x = w.ravel()
    if x.max() == x.min():
        return [0.0, 0.0]
    counts, _ = np.histogram(x, bins=50, range=(x.min(), x.max()))
    entropy = scipy.stats.entropy(counts[counts > 0])
    return [entropy, entropy / math.log(50)]


def ensemble(w):
    return [*spectral(w), *matrix_norms(w), *distribution(w), *frequency(w), *info_theoretic(w)]


def represent(name, batch):
    """(n, rows, cols) -> (n, width) float64, one matrix at a time, by this module's function of that name."""
    return np.array([globals()[name](np.asarray(w, dtype=np.float64)) for w in batch])


# --- of the product, formed as a dense matrix: down (r, in), up (out, r) float64


def profile(s):
    """The columns of `spectral` for given singular values."""
    return spectral(np.diag(s))


def product_spectral(down, up):
    w = up @ down
    return profile(np.linalg.svd(w, compute_uv=False)[: min(len(down), *w.shape)])


def product_norms(down, up):
    w = up @ down
    frobenius, nuclear, largest = (np.linalg.norm(w, kind) for kind in ("fro", "nuc", 2))
    rows, columns = np.sqrt((w**2).sum(1)), np.sqrt((w**2).sum(0))
    ratios = [nuclear / frobenius, largest / frobenius] if frobenius > 0 else [0.0, 0.0]
    return [frobenius, nuclear, largest, rows.max(), columns.max(), *ratios]


def product_moments(down, up):
    return [np.mean((up @ down) ** k) for k in (1, 2, 3, 4)]


def product_quantiles(down, up):
    w = up @ down
    return [
        np.percentile([np.linalg.norm(vector) for vector in vectors], q)
        for vectors in (w, w.T)
        for q in (0, 5, 10, 25, 50, 75, 90, 95, 100)
    ]


def gaussian(side, count, size):
    """The fixed projections: part of the definition."""
    return np.random.default_rng([0, *side.encode(), size]).normal(size=(count, size))


def product_sketch(down, up, k=16):
    w = up @ down
    return (gaussian("out", k, len(w)) @ w @ gaussian("in", k, w.shape[1]).T).ravel()


def balanced(down, up):
    """Rows sqrt(s_i) u_i and sqrt(s_i) v_i, signs fixed:
    the largest of 16 projections of u_i, in absolute value, is positive.
    """
    u, s, v = np.linalg.svd(up @ down, full_matrices=False)
    r = min(len(down), len(s))
    left, right = (u * np.sqrt(s)).T[:r], (v.T * np.sqrt(s)).T[:r]
    for i in range(r):
        probes = gaussian("out", 16, len(up)) @ left[i]
        if probes[np.abs(probes).argmax()] < 0:
            left[i], right[i] = -left[i], -right[i]
    return left, right


def product_directions(down, up):
    left, right = balanced(down, up)
    found = np.zeros((2, 4, 16))
    for i in range(min(4, len(left))):
        found[0, i] = gaussian("out", 16, len(up)) @ left[i]
        found[1, i] = gaussian("in", 16, down.shape[1]) @ right[i]
    return found.ravel()


def represent_product(name, downs, ups):
    """(n, r, in) and (n, out, r) -> (n, width) float64, one module at a time."""
    pairs = zip(np.asarray(downs, dtype=np.float64), np.asarray(ups, dtype=np.float64), strict=True)
    return np.array([globals()[name](down, up) for down, up in pairs])


def linear_kernel(modules):
    """<dW_i, dW_j> summed over modules, of their (down (n, r, in), up (n, out, r)) pairs: (n, n)."""
    rows = dense_products(modules)
    return rows @ rows.T


def dense_products(modules):
    """All entries of all products, (n, D)."""
    return np.concatenate(
        [(up.astype(np.float64) @ down.astype(np.float64)).reshape(len(up), -1) for down, up in modules],
        axis=1,
    )


def centroid_cosines(modules, labels, train, folds, num_classes):
    """Row by row: of each module the first left, then right singular vector to every class's mean over the
    training rows of other folds.
    """
    n, found = len(labels), []
    for down, up in modules:
        for side in (0, 1):
            vectors = np.array(
                [balanced(down[i].astype(np.float64), up[i].astype(np.float64))[side][0] for i in range(n)]
            )
            vectors /= np.linalg.norm(vectors, axis=1)[:, None]
            cosines = np.zeros((n, num_classes))
            for i in range(n):
                own = folds[list(train).index(i)] if i in train else None
                for c in range(num_classes):
                    seen = [j for j, fold in zip(train, folds, strict=True) if labels[j] == c and fold != own]
                    if seen:
                        centroid = vectors[seen].mean(0)
                        cosines[i, c] = vectors[i] @ centroid / np.linalg.norm(centroid)
            found.append(cosines)
    return np.concatenate(found, axis=1)


def train_one_model(x, labels, train, val, num_classes, settings, seed, batches):
    """The plain training loop of one model at dropout 0, with torch's own modules, optimizer and scheduler.

    `batches(epoch)` gives the epoch's list of row-number tensors. Returns the losses, accuracies, learning
    rates and the best epoch's state, copied when it was reached.
    """
    torch.manual_seed(seed)
    layers, width = [], x.shape[1]
    for _ in range(3):
        layers += [nn.Linear(width, settings.hidden_dim), nn.BatchNorm1d(settings.hidden_dim), nn.ReLU()]
        width = settings.hidden_dim
    model = nn.Sequential(*layers, nn.Linear(width, num_classes)).to(x.dtype)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=10)
    out = {"loss": [], "val_acc": [], "lr": [], "best_epoch": 0, "best": None}
    best = -1.0
    for epoch in range(1, settings.max_epochs + 1):
        model.train()
        total, rows = 0.0, 0
        for batch in batches(epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[train[batch]]), labels[train[batch]])
            loss.backward()
            optimizer.step()
            total, rows = total + loss.item() * len(batch), rows + len(batch)
        model.eval()
        with torch.no_grad():
            accuracy = (model(x[val]).argmax(1) == labels[val]).double().mean().item()
        out["loss"].append(total / rows)
        out["val_acc"].append(accuracy)
        out["lr"].append(optimizer.param_groups[0]["lr"])
        scheduler.step(accuracy)
        if accuracy > best:
            best, out["best_epoch"] = accuracy, epoch
            out["best"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        elif epoch - out["best_epoch"] >= settings.patience:
            break
    model.load_state_dict(out["best"])
    model.eval()
    with torch.no_grad():
        out["predictions"] = model(x).argmax(1)
    return out
