"""Rows and gradients of several tensor trains in one call; the arithmetic is `ops.tensor_train`'s.

Source: own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.ops.registry import address, check_tensor, face_of
from shardlab.ops.tensor_train import (
    SliceGradients,
    TensorTrain,
    Workspace,
    native_slice_gradients,
    tensor_train_gradients,
    tensor_train_rows,
)


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
        order: (train, core) of every core once, in the order in which gradients are wanted.
        every: of every train, whether slices that no id meets get a gradient of zeros; a train
            without ids has no gradients.
        workspace: holds the result until its next use.

    Raises:
        ValueError: a core is missing in ``order``.
    """
    check_tensor("grads", grads, torch.float32)
    if face_of("tensor_train_gradients", grads.device.type) == "native":
        return native_slice_gradients(order, every, grads, workspace)
    found = []
    for (train, span, part), fill in zip(_parts(trains, edges, grads), every, strict=True):
        one = tensor_train_gradients(train, ids[span], part, Workspace(), products=False)
        pairs = list(zip(one.touched, one.grads, strict=True))
        if fill and span.stop > span.start:
            pairs = [all_slices(core.shape[0], *pair)
                     for core, pair in zip(train.cores, pairs, strict=True)]
        found.append(pairs)
    return join_gradients([found[train][core] for train, core in order], grads.device)


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
