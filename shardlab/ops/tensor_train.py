"""Rows of tensor-train tables and the gradients of their cores (arXiv 2101.11714).

A table is a product of cores: with the digits (i1, ..., id) of a row in the mixed radix of the row
factors,

    row(i) = G1[i1] G2[i2] .. Gd[id],        Gk[ik] of shape [r_(k-1), q_k, r_k], r_0 = r_d = 1,

its columns in the order of (j1, ..., jd), the last one fastest. The product of the leading cores is
computed once per distinct prefix (i1, ..., ik) of a batch, and kept from the read to the gradients.

Source: TT-Rec, arXiv 2101.11714; reuse of leading products as in EL-Rec (SC 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardlab.ops.registry import address, check_tensor, face_of
from shardlab.ops.tensor_train_types import (
    CoreGradients,
    SliceGradients,
    TensorTrain,
    Workspace,
    prefix_levels,
)


def tensor_train_rows(train: TensorTrain, ids: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Computes rows.

    Args:
        train: fp32 cores.
        ids: int64 [n], ascending, each once, in [0, padded rows).
        out: fp32 [n, columns], contiguous; written in place.
        workspace: keeps the leading products for `tensor_train_gradients` of the same ids.
    """
    _check(train, ids, out)
    face = face_of("tensor_train_rows", out.device.type)
    if face == "native":
        workspace.batch.rows([train.kernel], address(ids), [0, ids.numel()], address(out),
                             torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import tensor_train as kernels

        kernels.tensor_train_rows(train, ids, out)
    else:
        train.check()
        out.copy_(tensor_train_rows_reference(train, ids))


def tensor_train_rows_reference(train: TensorTrain, ids: Tensor) -> Tensor:
    """Plain-torch face of `tensor_train_rows`, of any dtype and differentiable: [n, columns]."""
    if not ids.numel():
        return ids.new_zeros(0, math.prod(train.shape.column_factors), dtype=train.cores[0].dtype)
    levels = prefix_levels(train.shape, ids)
    left = _products(train, levels)[-1]
    last, (parent, digit) = logical_cores(train)[-1], levels[-1]
    return torch.bmm(left[parent], last[digit].squeeze(3)).flatten(1)


def logical_cores(train: TensorTrain) -> list[Tensor]:
    """Cores as [p_k, r_(k-1), q_k, r_k]."""
    cores = []
    for number, (core, (before, rows, columns, after)) in enumerate(
            zip(train.cores, train.shape.core_shapes, strict=True)):
        if number == len(train.cores) - 1:
            cores.append(core.view(rows, columns, before, 1).transpose(1, 2))
        else:
            cores.append(core.view(rows, before, columns, after))
    return cores


def _products(train: TensorTrain, levels: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Of every core but the last: the products [nodes, leading columns, r_k] of its prefixes."""
    cores = logical_cores(train)
    products = [cores[0][levels[0][1]].squeeze(1)]
    for core, (parent, digit) in zip(cores[1:-1], levels[1:-1], strict=True):
        step = torch.bmm(products[-1][parent], core[digit].flatten(2))
        products.append(step.view(len(digit), -1, core.shape[3]))
    return products


# ---------------------------------------------------------------- gradients
def tensor_train_gradients(train: TensorTrain, ids: Tensor, grads: Tensor, workspace: Workspace, *,
                           products: bool) -> CoreGradients:
    """Gradients of the cores, exact and in a fixed order of summation.

    Args:
        train: fp32 cores.
        ids: int64 [n], ascending, each once.
        grads: fp32 [n, columns], contiguous: gradient of every row.
        workspace: holds the result until its next use.
        products: the workspace still holds the products of `tensor_train_rows` of these ids, and
            no core has changed since.
    """
    _check(train, ids, grads)
    face = face_of("tensor_train_gradients", grads.device.type)
    if face == "native":
        return _native_gradients(train, ids, grads, workspace, products)
    if face == "triton":
        from shardlab.ops.triton import tensor_train as kernels

        return kernels.tensor_train_gradients(train, ids, grads)
    return tensor_train_gradients_reference(train, ids, grads)


def _native_gradients(train: TensorTrain, ids: Tensor, grads: Tensor, workspace: Workspace,
                      products: bool) -> CoreGradients:
    if not products:
        rows = workspace.take("rows", grads.numel(), grads).view_as(grads)
        tensor_train_rows(train, ids, rows, workspace)
    found = native_slice_gradients([(0, core) for core in range(len(train.cores))], [False], grads,
                                   workspace)
    pairs = [found.core(number, core.shape[1]) for number, core in enumerate(train.cores)]
    return CoreGradients(tuple(touched for touched, _ in pairs),
                         tuple(values for _, values in pairs))


def native_slice_gradients(order: Sequence[tuple[int, int]], every: Sequence[bool], grads: Tensor,
                           workspace: Workspace) -> SliceGradients:
    """Gradients of the ids that the workspace's batch read last.

    Args:
        order: (train, core) of the cores, as they are wanted.
        every: of every train, whether slices that no id meets get a gradient of zeros.
        grads: fp32, flat: of the rows of all trains, one behind the other.
        workspace: holds the result until its next use.
    """
    slices, elements = workspace.batch.sizes(order, every)
    lists = workspace.take("touched", 2 * slices, torch.empty(0, dtype=torch.int64))
    ids, sources = lists[:slices], lists[slices:]
    splits = torch.empty(len(order) + 1, dtype=torch.int64)
    flat = workspace.take("grads", elements, grads)
    workspace.batch.gradients(address(grads), order, every,
                              [address(tensor) for tensor in (ids, splits, sources, flat)],
                              torch.get_num_threads())
    return SliceGradients(ids, splits, sources, flat)


def tensor_train_gradients_reference(train: TensorTrain, ids: Tensor,
                                     grads: Tensor) -> CoreGradients:
    """Plain-torch face of `tensor_train_gradients`, of any dtype."""
    if not ids.numel():
        return CoreGradients(tuple(ids[:0] for _ in train.cores),
                             tuple(core[:0] for core in train.cores))
    levels, cores = prefix_levels(train.shape, ids), logical_cores(train)
    products = _products(train, levels)
    parent, digit = levels[-1]
    left = products[-1][parent]
    rows = grads.view(len(ids), left.shape[1], -1)
    found = [_sum_slices(torch.bmm(rows.mT, left), digit)]
    up = _sum_children(torch.bmm(rows, cores[-1][digit].squeeze(3).mT), parent)
    for number in range(len(cores) - 2, 0, -1):
        parent, digit = levels[number]
        left, core = products[number - 1][parent], cores[number]
        step = up.reshape(len(digit), left.shape[1], -1)
        found.append(_sum_slices(torch.bmm(left.mT, step), digit))
        up = _sum_children(torch.bmm(step, core[digit].flatten(2).mT), parent)
    found.append((levels[0][1], up.flatten(1)))
    return CoreGradients(tuple(slices for slices, _ in reversed(found)),
                         tuple(values for _, values in reversed(found)))


def _sum_slices(values: Tensor, digit: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [n, ...] by slice: the slices, ascending, and [slices, elements]."""
    order = torch.argsort(digit, stable=True)
    touched, counts = torch.unique_consecutive(digit[order], return_counts=True)
    return touched, torch.segment_reduce(values[order].flatten(1), "sum", lengths=counts)


def _sum_children(values: Tensor, parent: Tensor) -> Tensor:
    """Sums [n, ...] over the nodes of each parent, which stand side by side."""
    counts = torch.unique_consecutive(parent, return_counts=True)[1]
    summed = torch.segment_reduce(values.flatten(1), "sum", lengths=counts)
    return summed.view(-1, *values.shape[1:])


def _check(train: TensorTrain, ids: Tensor, rows: Tensor) -> None:
    columns = math.prod(train.shape.column_factors)
    check_tensor("ids", ids, torch.int64)
    check_tensor("rows", rows, torch.float32)
    if rows.shape != (ids.numel(), columns):
        raise TypeError(f"rows: expected [{ids.numel()}, {columns}], found {tuple(rows.shape)}")


def materialise(train: TensorTrain, ids: Sequence[int] | Tensor) -> Tensor:
    """Rows in any order, with repetitions: fp32 [n, columns]; for checks and exports."""
    wanted = torch.as_tensor(ids, dtype=torch.int64)
    unique, inverse = torch.unique(wanted, return_inverse=True)
    out = torch.empty(unique.numel(), math.prod(train.shape.column_factors))
    tensor_train_rows(train, unique, out, Workspace())
    return out[inverse]
