"""Rows, gradients and steps of several tensor trains in one call each.

The arithmetic is that of `ops.tensor_train` and `ops.rows`. Source: own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.registry import address, check_tensor, face_of
from shardlab.ops.rows import update_rows
from shardlab.ops.step_parameters import RULES, StepParameters
from shardlab.ops.tensor_train import (
    native_slice_gradients,
    tensor_train_gradients,
    tensor_train_rows,
)
from shardlab.ops.tensor_train_types import SliceGradients, TensorTrain, Workspace
from shardlab.ops.unique import Uniques

_ADAMS = ("adam", "row_wise_adam")


@dataclass(frozen=True)
class CoreSlices:
    """Cores that are stepped alike: slices are rows of blocks.

    Attributes:
        arena: uint8.
        blocks: where slices and states lie; block b holds the core ``owners[b]``.
        owners: (train, core) of every block.
        lr_multiple: learning rate as a multiple of the step's.
    """

    arena: Tensor
    blocks: Blocks
    owners: list[tuple[int, int]]
    lr_multiple: float

    def own_step(self, step: StepParameters) -> StepParameters:
        """The step of these slices; their gradients are scaled and clipped already."""
        return replace(step, lr=step.lr * self.lr_multiple, scale=1.0, clip_value=0.0, rows=None)

    @property
    def addresses(self) -> list[int]:
        """What the native face takes."""
        return [address(one) for one in (self.arena, self.blocks.table, self.blocks.encodings)]


def batch_rows(trains: Sequence[TensorTrain], ids: Tensor, edges: Sequence[int], out: Tensor,
               workspace: Workspace) -> None:
    """Computes rows of several trains.

    Args:
        trains: fp32 cores.
        ids: int64 [n]; those of train t are ids[edges[t]:edges[t + 1]], ascending, each once.
        edges: trains + 1 numbers.
        out: fp32, flat: rows of all trains, one behind the other; written in place.
        workspace: keeps the leading products for `batch_gradients` of the same ids.
    """
    if face_of("tensor_train_rows", out.device.type) == "native":
        check_tensor("ids", ids, torch.int64)
        check_tensor("out", out, torch.float32)
        workspace.batch.rows([train.kernel for train in trains], address(ids), edges, address(out),
                             torch.get_num_threads())
        return
    for train, span, part in _parts(trains, edges, out):
        tensor_train_rows(train, ids[span], part, workspace)


def batch_gradients(trains: Sequence[TensorTrain], ids: Tensor, edges: Sequence[int],
                    grads: Tensor, order: Sequence[tuple[int, int]], every: Sequence[bool],
                    workspace: Workspace) -> SliceGradients:
    """Gradients of the cores of several trains, exact and in a fixed order of summation.

    Args:
        trains, ids, edges: as the last `batch_rows` with this workspace had them; no core has
            changed since.
        grads: fp32, flat: of the rows of all trains, one behind the other.
        order: (train, core) of every core of the trains that are wanted, in the order in which
            gradients are.
        every: of every train, whether slices that no id meets get a gradient of zeros; a train
            without ids has no gradients.
        workspace: holds the result until its next use.

    Raises:
        ValueError: a core is missing in ``order``.
    """
    check_tensor("grads", grads, torch.float32)
    if face_of("tensor_train_gradients", grads.device.type) == "native":
        return native_slice_gradients(order, every, grads, workspace)
    found, wanted = [], {train for train, _ in order}
    for number, (train, span, part) in enumerate(_parts(trains, edges, grads)):
        if number not in wanted:
            found.append([])
            continue
        one = tensor_train_gradients(train, ids[span], part, Workspace(), products=False)
        pairs = list(zip(one.touched, one.grads, strict=True))
        if every[number] and span.stop > span.start:
            pairs = [all_slices(core.shape[0], *pair)
                     for core, pair in zip(train.cores, pairs, strict=True)]
        found.append(pairs)
    return join_gradients([found[train][core] for train, core in order], grads.device)


def batch_steps(trains: Sequence[TensorTrain], ids: Tensor, edges: Sequence[int], grads: Tensor,
                cores: Sequence[CoreSlices], step: StepParameters, workspace: Workspace) -> None:
    """One optimiser step on the cores of several trains, by the gradients of `batch_gradients`.

    Slices that no id meets move where the rule moves them, in trains that have ids.

    Args:
        trains, ids, edges, grads: as `batch_gradients` has them.
        cores: all cores of the trains that are to be stepped; others stay as they are.
        step: gradients are scaled and clipped already; its key is of the random bits of slices.
        workspace: holds the products of `batch_rows`, which are used up.
    """
    check_tensor("grads", grads, torch.float32)
    every = moves_every_slice(step)
    if face_of("tensor_train_steps", grads.device.type) == "native":
        memories = [(part.addresses, part.own_step(step).numbers(), part.owners) for part in cores]
        workspace.batch.step(address(grads), memories, len(trains), RULES[step.kind], step.key,
                             every, torch.get_num_threads())
        return
    order = [owner for part in cores for owner in part.owners]
    found = batch_gradients(trains, ids, edges, grads, order, [every] * len(trains), workspace)
    first = 0
    for part in cores:
        step_slices(part, found, first, step)
        first += len(part.owners)


def moves_every_slice(step: StepParameters) -> bool:
    """Whether the rule also moves slices that got no gradient."""
    return step.kind in _ADAMS or step.weight_decay > 0


def step_slices(cores: CoreSlices, grads: SliceGradients, first: int, step: StepParameters,
                row_squares: Tensor | None = None) -> None:
    """One optimiser step on slices.

    Args:
        cores: what to step.
        grads: those of ``cores`` are [first, first + blocks) of them.
        first: see ``grads``.
        step: gradients are scaled and clipped already.
        row_squares: fp32 [slices]: mean square of every slice's gradient, -1 where the memory
            holds the whole slice; or None.
    """
    splits = grads.splits[first:first + len(cores.owners) + 1]
    begin, end = splits[[0, -1]].tolist()
    if begin == end:
        return
    uniques = Uniques(grads.ids[begin:end], splits - begin,
                      torch.arange(end - begin + 1, device=grads.ids.device),
                      grads.sources[begin:end])
    update_rows(cores.arena, cores.blocks, uniques, None, grads.grads, cores.own_step(step),
                row_squares)


def _parts(trains: Sequence[TensorTrain], edges: Sequence[int],
           flat: Tensor) -> list[tuple[TensorTrain, slice, Tensor]]:
    """Every train, where its ids are, and its rows [n, columns] of ``flat``."""
    parts, at = [], 0
    for number, train in enumerate(trains):
        columns = 1
        for factor in train.shape.column_factors:
            columns *= factor
        span = slice(edges[number], edges[number + 1])
        size = (span.stop - span.start) * columns
        parts.append((train, span, flat[at:at + size].view(-1, columns)))
        at += size
    return parts


def all_slices(slices: int, touched: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a core with zeros for the slices that got none."""
    dense = grads.new_zeros(slices, grads.shape[1])
    dense[touched] = grads
    return torch.arange(slices, device=grads.device), dense


def join_gradients(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> SliceGradients:
    """Many cores' (touched, gradients [slices, elements]) one behind the other."""
    splits = torch.tensor([0, *accumulate(touched.numel() for touched, _ in pairs)])
    starts = accumulate((grads.numel() for _, grads in pairs), initial=0)
    sources = [start + grads.shape[1] * torch.arange(len(touched), device=device)
               for start, (touched, grads) in zip(starts, pairs, strict=False)]
    return SliceGradients(torch.cat([touched for touched, _ in pairs]), splits,
                          torch.cat(sources), torch.cat([grads.reshape(-1) for _, grads in pairs]))
