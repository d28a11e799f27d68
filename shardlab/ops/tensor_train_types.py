"""Tensor trains, gradients of their cores, and what calls keep between each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shardlab.ops.registry import address, check_tensor, native
from shardlab.tensor_train_shapes import TensorTrainShape


@dataclass(frozen=True)
class TensorTrain:
    """Cores of a table or of a rectangle of one.

    Attributes:
        shape: factors and ranks.
        cores: one matrix of slices [p_k, r_(k-1) q_k r_k] each, contiguous; a slice lies as
            [r_(k-1)][q_k][r_k], of the last core as [q_d][r_(d-1)]: the bond is innermost.
    """

    shape: TensorTrainShape
    cores: tuple[Tensor, ...]

    @cached_property
    def kernel(self) -> tuple[list[int], list[int]]:
        """What the native face takes: sizes, and where the cores begin.

        Raises:
            TypeError: a core of another size, dtype or layout than the shape says.
        """
        self.check()
        return train_numbers(self.shape), [address(core) for core in self.cores]

    def check(self) -> None:
        """Refuses cores that a kernel would misread.

        Raises:
            TypeError: another dtype, layout or size.
        """
        for number, (core, shape) in enumerate(zip(self.cores, self.shape.core_shapes,
                                                   strict=True)):
            check_tensor(f"core {number}", core, torch.float32)
            if core.shape != (shape[1], math.prod(shape) // shape[1]):
                raise TypeError(f"core {number}: expected {shape[1]} slices of "
                                f"{math.prod(shape) // shape[1]} elements, found "
                                f"{tuple(core.shape)}")


def train_numbers(shape: TensorTrainShape) -> list[int]:
    """(cores, row factors, column factors, ranks) as one list."""
    return [len(shape.row_factors), *shape.row_factors, *shape.column_factors, *shape.ranks]


def train_of(numbers: Sequence[int], tensors: Mapping[str, Tensor]) -> TensorTrain:
    """Cores as a checkpoint holds them, by `train_numbers` and tensors named core0, core1, ..."""
    count = numbers[0]
    factors = numbers[1:1 + count]
    shape = TensorTrainShape(math.prod(factors), tuple(factors),
                             tuple(numbers[1 + count:1 + 2 * count]),
                             tuple(numbers[1 + 2 * count:]))
    return TensorTrain(shape, tuple(tensors[f"core{number}"].float().contiguous()
                                    for number in range(count)))


@dataclass(frozen=True)
class CoreGradients:
    """Gradients of the slices that a batch touches.

    Attributes:
        touched: int64 [t_k] of every core, ascending: its slices that got a gradient.
        grads: [t_k, slice elements] of every core.
    """

    touched: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


@dataclass(frozen=True)
class SliceGradients:
    """The same of many cores, one behind the other, as `shardlab.ops.rows.update_rows` takes them.

    Attributes:
        ids: int64 [t]: slices that got a gradient, ascending within a core.
        splits: int64 [cores + 1] on CPU: where each core's begin in ``ids``, and the end.
        sources: int64 [t]: where each slice's gradient begins in ``grads``.
        grads: fp32, flat.
    """

    ids: Tensor
    splits: Tensor
    sources: Tensor
    grads: Tensor

    def core(self, number: int, elements: int) -> tuple[Tensor, Tensor]:
        """(touched, gradients [t_k, elements]) of one core."""
        first, end = self.splits[number:number + 2].tolist()
        if first == end:
            return self.ids[:0], self.grads[:0].view(0, elements)
        start = int(self.sources[first])
        return (self.ids[first:end],
                self.grads[start:start + (end - first) * elements].view(-1, elements))


@dataclass
class Workspace:
    """Memory that calls share and keep: fresh pages would cost more than small products do."""

    _buffers: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def batch(self) -> Any:
        """What the native face keeps from a read to the gradients."""
        return native().TensorTrainBatch()  # type: ignore[union-attr]

    def take(self, name: str, count: int, like: Tensor) -> Tensor:
        """[count] elements of the dtype and on the device of ``like``; contents undefined."""
        held = self._buffers.get(name)
        if held is None or held.numel() < count or held.device != like.device \
                or held.dtype != like.dtype:
            held = torch.empty(count, dtype=like.dtype, device=like.device)
            self._buffers[name] = held
        return held[:count]


def prefix_levels(shape: TensorTrainShape, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For every core: (parent, digit) of the distinct prefixes that end there; ids at the last."""
    levels, prefixes = [], ids
    for rows in reversed(shape.row_factors[1:]):
        above, parent = torch.unique_consecutive(prefixes // rows, return_inverse=True)
        levels.append((parent, prefixes % rows))
        prefixes = above
    return [(torch.zeros_like(prefixes), prefixes), *reversed(levels)]
