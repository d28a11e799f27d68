"""Fully connected layers, with DLRM's initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from shardlab.ops.linear import linear_relu


class Layer(nn.Module):
    """One fully connected layer, with a ReLU when asked for; names and shapes as `nn.Linear`.

    Initial weights are normal with variance 2 / (inputs + outputs), the bias with 1 / outputs, as
    in the reference code of Source: Naumov et al., arXiv 1906.00091. They come from torch's global
    generator.

    Args:
        inputs: columns that come in.
        outputs: columns that go out.
        relu: whether a ReLU follows.
    """

    def __init__(self, inputs: int, outputs: int, relu: bool = True) -> None:
        super().__init__()
        self.relu = relu
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new initial weights."""
        outputs, inputs = self.weight.shape
        nn.init.normal_(self.weight, std=(2 / (inputs + outputs)) ** 0.5)
        nn.init.normal_(self.bias, std=(1 / outputs) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs] to [B, outputs]."""
        return linear_relu(x, self.weight, self.bias, self.relu)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        outputs, inputs = self.weight.shape
        return f"{inputs}, {outputs}, relu={self.relu}"


class MLP(nn.Module):
    """Layers one after the other.

    Args:
        inputs: columns that come in.
        sizes: columns that each layer puts out.
        last_relu: whether a ReLU follows the last layer too.
    """

    def __init__(self, inputs: int, sizes: Sequence[int], last_relu: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(a, b, relu=last_relu or index + 1 < len(sizes))
            for index, (a, b) in enumerate(pairwise([inputs, *sizes])))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, inputs] to [B, sizes[-1]]; without layers, x itself."""
        for layer in self.layers:
            x = layer(x)
        return x
