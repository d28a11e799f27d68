"""Cores that come closest to a given table: TT-SVD from both ends.

The table is a tensor of d axes, n_k = p_k q_k each. Of its first axis the leading r_1 left singular
vectors become the first core, of its last axis those of the other side the last core, and what is
left goes on between them; so the matrices whose vectors are sought stay small (400 x 400 and
1000 x 1000 for a table of 10 million rows x 16). The error is at most the root of the sum of what
the bonds drop, sqrt(d - 1) times the best there is.

Source: Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 2011; both ends: own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardlab.errors import ShardLabError
from shardlab.tensor_train_shapes import TensorTrainShape

#: Up to this side, singular vectors come from the whole Gram matrix; above, from a random subspace.
_MAX_GRAM = 4096
_OVERSAMPLED, _ROUNDS = 16, 4
#: Columns of a matrix that are turned to fp64 at a time.
_BLOCK = 1 << 16


def decompose(table: Tensor, shape: TensorTrainShape) -> tuple[Tensor, ...]:
    """Cores for a table.

    Args:
        table: fp32 [rows, columns]; rows that the cores express beyond it are taken as zeros.
        shape: factors and ranks.

    Returns:
        fp32 [p_k, elements] of every core, as `shardlab.ops.tensor_train.TensorTrain` has them.

    Raises:
        ShardLabError: the table is of another size.
    """
    columns = math.prod(shape.column_factors)
    if table.dim() != 2 or table.shape[1] != columns or table.shape[0] > shape.padded_rows:
        raise ShardLabError(f"decompose: expected at most {shape.padded_rows} rows x {columns} "
                            f"columns for factors {list(shape.row_factors)} and "
                            f"{list(shape.column_factors)}, found {tuple(table.shape)}")
    rest, first, last = _axes(table, shape), 0, len(shape.row_factors) - 1
    cores: list[Tensor] = [table] * (last + 1)
    while first < last:
        left, right = shape.ranks[first], shape.ranks[last + 1]
        sizes = [p * q for p, q in zip(shape.row_factors, shape.column_factors, strict=True)]
        if left * sizes[first] <= right * sizes[last]:
            matrix = rest.reshape(left * sizes[first], -1)
            basis = _leading(matrix, shape.ranks[first + 1])
            cores[first], rest = basis, basis.T @ matrix
            first += 1
        else:
            matrix = rest.reshape(-1, sizes[last] * right)
            basis = _leading(matrix.T, shape.ranks[last])
            cores[last], rest = basis.T.contiguous(), matrix @ basis
            last -= 1
    cores[first] = rest
    return tuple(_laid_out(core, shape, number) for number, core in enumerate(cores))


def _axes(table: Tensor, shape: TensorTrainShape) -> Tensor:
    """The table as a tensor [p_1 q_1, ..., p_d q_d]."""
    count = len(shape.row_factors)
    padded = table.new_zeros(shape.padded_rows, table.shape[1])
    padded[:table.shape[0]] = table
    order = [axis for k in range(count) for axis in (k, count + k)]
    tensor = padded.view(*shape.row_factors, *shape.column_factors).permute(order)
    return tensor.reshape([p * q for p, q in zip(shape.row_factors, shape.column_factors,
                                                 strict=True)])


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors: fp32 [rows, rank], orthonormal."""
    rows = matrix.shape[0]
    if rows <= _MAX_GRAM:
        gram = torch.zeros(rows, rows, dtype=torch.float64)
        for first in range(0, matrix.shape[1], _BLOCK):
            part = matrix[:, first:first + _BLOCK].double()
            gram.addmm_(part, part.T)
        return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float().contiguous()
    generator = torch.Generator().manual_seed(0)
    width = min(rank + _OVERSAMPLED, *matrix.shape)
    space = torch.randn(matrix.shape[1], width, generator=generator)
    for _ in range(_ROUNDS):
        space = matrix.T @ torch.linalg.qr(matrix @ space).Q
    basis = torch.linalg.qr(matrix @ space).Q
    turn = torch.linalg.svd(basis.T @ matrix, full_matrices=False).U
    return (basis @ turn)[:, :rank].contiguous()


def _laid_out(core: Tensor, shape: TensorTrainShape, number: int) -> Tensor:
    """[r_(k-1), p_k, q_k, r_k] as slices."""
    before, rows, columns, after = shape.core_shapes[number]
    whole = core.reshape(before, rows, columns, after)
    last = number == len(shape.row_factors) - 1
    slices = whole.permute(1, 2, 0, 3) if last else whole.permute(1, 0, 2, 3)
    return slices.reshape(rows, before * columns * after).contiguous()
