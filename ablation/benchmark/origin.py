"""The origin's way of each stage, written anew, as the yardstick."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ablation.collection import LoraCollection
from ablation.mlp import HIDDEN_LAYERS, has_stopped, plateau, record_epoch
from ablation.settings import TrainingSettings
from ablation.splits import Split
from ablation.task import Run

PERCENTS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def read_formatted(data: LoraCollection, layers: list[str]) -> list[Tensor]:
    """The layers through the torch formatter, after a random split, as the origin reads."""
    shuffled = data.weights.dataset.select_columns(layers).train_test_split(test_size=0.2, seed=42)
    return [part[layer][:] for part in shuffled.values() for layer in layers]


def describe_one_by_one(w: Tensor) -> list[Tensor]:
    """The operations of the nine representations of (n, rows, cols), each on its own and nothing shared.

    What is timed is which operations run. The numbers are not used, and the cheap last steps (shares, ratios)
    are left out.
    """
    x, n = w.flatten(1), len(w)
    simple = [x.norm(dim=1), x.mean(1), x.std(1), x.amax(1), x.amin(1)]
    median = [x.median(1).values, x.amin(1), x.amax(1)]
    once = [*simple, row_quantiles(x, PERCENTS), *median, *moments(x)]
    # The five parts stand alone, and again in the ensemble.
    results = [*once, *five_parts(w, x), *five_parts(w, x)]
    return [part.reshape(-1)[:n] for part in results]


def five_parts(w: Tensor, x: Tensor) -> list[Tensor]:
    """spectral, matrix_norms, distribution, frequency,
    info_theoretic of matrices w, whose entries are x (n, N).
    """
    norms = [torch.linalg.matrix_norm(w, order) for order in ("fro", 1, math.inf)]
    deviation = (x - x.mean(1, keepdim=True)).abs().mean(1)
    spread = [row_quantiles(x, PERCENTS[1:8]), deviation, *moments(x)]
    histograms = [torch.histc(row, 50) for row in x]
    singular = [torch.linalg.svdvals(w), *norms, torch.linalg.svdvals(w)]
    return [*singular, *spread, *magnitudes(w), *histograms]


def row_quantiles(x: Tensor, percents: tuple[float, ...]) -> Tensor:
    """Quantiles of each row."""
    return torch.quantile(x, torch.tensor(percents, device=x.device), dim=1)


def moments(x: Tensor) -> list[Tensor]:
    """Third and fourth central moments and std of each row."""
    d = x - x.mean(1, keepdim=True)
    return [(d**3).mean(1), (d**4).mean(1), x.std(1)]


def magnitudes(w: Tensor) -> list[Tensor]:
    """Statistics of the magnitudes of the 2-D FFT."""
    sizes = torch.fft.fft2(w).abs().flatten(1)
    top = sizes.topk(min(10, sizes.shape[1])).values
    return [top, sizes.mean(1), sizes.std(1), sizes.amax(1), (sizes**2).sum(1)]


def train_from_loader(
    x_ND: Tensor, y_N: Tensor, split: Split, num_classes: int, settings: TrainingSettings
) -> Run:
    """One run the usual way: DataLoader, torch's modules, plain Adam, losses read at every step."""
    torch.manual_seed(settings.seed)
    model = plain_model(x_ND.shape[1], num_classes, settings).to(x_ND.device)
    train, val = (
        DataLoader(TensorDataset(x_ND[rows], y_N[rows]), settings.batch_size, shuffle=shuffle)
        for rows, shuffle in ((split.train, True), (split.val, False))
    )
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = plateau(optimizer)
    run, weights = Run(settings.seed), {}
    while not has_stopped(run, settings):
        total = train_epoch(model, train, optimizer)
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(rows).argmax(1) == labels).sum()) for rows, labels in val)
        rate = optimizer.param_groups[0]["lr"]
        if record_epoch(run, total / len(split.train), correct, len(split.val), rate):
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        scheduler.step(run.val_accuracy[-1])
    model.load_state_dict(weights)
    with torch.no_grad():
        run.predictions = {"test": model(x_ND[split.test]).argmax(1).cpu().numpy()}
    return run


def plain_model(width: int, num_classes: int, settings: TrainingSettings) -> nn.Sequential:
    """The MLP of torch's own modules."""
    layers: list[nn.Module] = []
    for _ in range(HIDDEN_LAYERS):
        layers += [nn.Linear(width, settings.hidden_dim), nn.BatchNorm1d(settings.hidden_dim)]
        layers += [nn.ReLU(), nn.Dropout(settings.dropout)]
        width = settings.hidden_dim
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def train_epoch(model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> float:
    """One epoch; the loss summed over its rows."""
    model.train()
    total = 0.0
    for rows, labels in loader:
        if len(rows) < 2:
            continue
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(rows), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    return total
