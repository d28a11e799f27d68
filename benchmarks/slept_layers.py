"""A DLRM whose layers sleep instead of multiplying: what a link costs, on a busy machine, too.

Gradients have their real sizes and come in their real order; their values are constants. Layers
share the milliseconds by their weights, a third forward and two thirds backward.
"""

from __future__ import annotations

import time

import torch
from dlrm_data import DlrmConfig
from torch import Tensor, nn

_MS = 1e3
_GRADIENT = 1e-4


class _Sleep(torch.autograd.Function):
    """Zeros [B, rows of weight]; constant gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, seconds: float) -> Tensor:
        time.sleep(seconds / 3)
        ctx.save_for_backward(x, weight, bias)
        ctx.seconds = seconds
        return x.new_zeros(len(x), len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        time.sleep(ctx.seconds * 2 / 3)
        return (torch.zeros_like(x), torch.full_like(weight, _GRADIENT),
                torch.full_like(bias, _GRADIENT), None)


class _Layer(nn.Linear):
    seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, self.bias, self.seconds)


class SleptDLRM(nn.Module):
    """The benchmark's DLRM with layers that sleep; pairs are left out.

    Args:
        ebc: the tables.
        config: sizes.
        step_ms: of all layers, forward and backward.
    """

    def __init__(self, ebc: nn.Module, config: DlrmConfig, step_ms: float) -> None:
        super().__init__()
        vectors = len(config.rows) + 1
        self._pairs = vectors * (vectors - 1) // 2
        self.bottom = _layers([config.dense_features, *config.bottom])
        self.ebc = ebc
        self.top = _layers([config.dim + self._pairs, *config.top])
        layers = [*self.bottom, *self.top]
        total = sum(layer.weight.numel() for layer in layers)
        for layer in layers:
            layer.seconds = step_ms / _MS * layer.weight.numel() / total

    def forward(self, dense: Tensor, features: object) -> Tensor:
        bottom, pooled = self.bottom(dense), self.ebc(features).values()
        return self.top(torch.cat([bottom, pooled[:, :self._pairs]], dim=1)).squeeze(1)


def _layers(sizes: list[int]) -> nn.Sequential:
    return nn.Sequential(*(_Layer(inputs, outputs)
                           for inputs, outputs in zip(sizes, sizes[1:], strict=False)))
