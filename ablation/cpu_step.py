"""A training step of one run on a CPU without autograd.

It calls the kernels that autograd calls, on the same numbers in the same order, so that nothing differs by a
bit (a test compares the two). What it saves is the record of the graph, new memory and a transposed copy for
each gradient, and Adam's bookkeeping for each parameter. Suffixes name the axes: B rows of a batch, D
features, H hidden units, C classes, L hidden layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablation.mlp import AdamState, adam_step
from ablation.settings import TrainingSettings

aten = torch.ops.aten
MEAN, NONE = 1, 0  # reductions of a loss, as the kernels number them
NOT_A_CLASS = -100  # labels that a loss leaves out: none here
VECTOR = 16  # numbers that a kernel takes at once; what is left at an end is rounded otherwise


def in_pieces(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Copies of parameters: joined, where Adam's kernel rounds them as it does each alone; otherwise one by
    one.
    """
    flat = [parameter.detach().flatten() for parameter in parameters]
    is_whole = all(len(values) % VECTOR == 0 for values in flat[:-1])
    return [torch.cat(flat)] if is_whole else [values.clone() for values in flat]


def views_of(pieces: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    """The values of each parameter in the pieces of `in_pieces`, in its shape."""
    sizes = [parameter.numel() for parameter in parameters]
    flat = pieces[0].split(sizes) if len(pieces) == 1 else pieces
    return [values.view_as(parameter) for values, parameter in zip(flat, parameters, strict=True)]


class CpuStep:
    """Steps of Adam for a model of `build_model`, whose parameters it moves to memory of its own."""

    def __init__(self, model: nn.Sequential, settings: TrainingSettings, weights_C: Tensor | None):
        self.settings, self.weights_C = settings, weights_C
        parameters = list(model.parameters())
        self.parameters = in_pieces(parameters)
        self.gradients = [torch.zeros_like(piece) for piece in self.parameters]
        self.adam = AdamState.before(self.parameters)
        gradients = views_of(self.gradients, parameters)
        for parameter, values in zip(parameters, views_of(self.parameters, parameters), strict=True):
            parameter.data = values
        self.layers = [module for module in model if isinstance(module, nn.Linear)]
        self.norms = [module for module in model if isinstance(module, nn.BatchNorm1d)]
        # Gradients of weight and bias, of a layer and of the norm behind it in turn.
        pairs = list(zip(gradients[::2], gradients[1::2], strict=True))
        self.of_layers, self.of_norms = pairs[::2], pairs[1::2]

    @torch.no_grad()
    def __call__(self, x_BD: Tensor, y_B: Tensor, dropout_LBH: Tensor | None, learning_rate: float) -> Tensor:
        """One step on a batch of columns and class numbers. Returns the mean loss before the step."""
        inputs, normed = [x_BD], []
        for level, (layer, norm) in enumerate(zip(self.layers[:-1], self.norms, strict=True)):
            units = torch.addmm(layer.bias, inputs[-1], layer.weight.t())  # (B, H)
            h, *statistics = aten.native_batch_norm(
                units,
                norm.weight,
                norm.bias,
                norm.running_mean,
                norm.running_var,
                True,
                norm.momentum,
                norm.eps,
            )
            positive = h.relu_()
            normed.append((units, positive, statistics))
            inputs.append(positive if dropout_LBH is None else positive * dropout_LBH[level])
        last = self.layers[-1]
        loss, gradient = self.loss_of(torch.addmm(last.bias, inputs[-1], last.weight.t()), y_B)
        for level in reversed(range(len(self.layers))):
            if level < len(self.norms):
                gradient = self.behind_norm(level, gradient, dropout_LBH, normed[level])
            of_weight, of_bias = self.of_layers[level]
            torch.mm(gradient.t(), inputs[level], out=of_weight)
            torch.sum(gradient, 0, out=of_bias)
            if level:
                gradient = gradient @ self.layers[level].weight
        adam_step(self.parameters, self.gradients, self.adam, learning_rate, self.settings)
        return loss

    def loss_of(self, logits_BC: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy, and its gradient by the logits."""
        log_shares = torch.log_softmax(logits_BC, 1)
        reduction = MEAN if self.weights_C is None else NONE
        options = (y_B, self.weights_C, reduction, NOT_A_CLASS)
        losses, total = aten.nll_loss_forward(log_shares, *options)
        outer = torch.ones_like(losses) if self.weights_C is None else torch.full_like(losses, 1) / len(y_B)
        gradient = aten.nll_loss_backward(outer, log_shares, *options, total)
        return losses.mean(), aten._log_softmax_backward_data(gradient, log_shares, 1, logits_BC.dtype)

    def behind_norm(
        self,
        level: int,
        gradient: Tensor,
        dropout_LBH: Tensor | None,
        had: tuple[Tensor, Tensor, list[Tensor]],
    ) -> Tensor:
        """The gradient (B, H) by the units of a hidden layer, from that by what the next layer takes.

        `had` are the layer's units, those that were positive, and the batch's statistics. Notes the gradients
        of the norm's weight and bias.
        """
        norm, (of_weight, of_bias) = self.norms[level], self.of_norms[level]
        units, positive, statistics = had
        if dropout_LBH is not None:
            gradient = gradient * dropout_LBH[level]
        gradient = aten.threshold_backward(gradient, positive, 0)
        gradient, by_weight, by_bias = aten.native_batch_norm_backward(
            gradient,
            units,
            norm.weight,
            norm.running_mean,
            norm.running_var,
            *statistics,
            True,
            norm.eps,
            [True, True, True],
        )
        of_weight.copy_(by_weight)
        of_bias.copy_(by_bias)
        return gradient
