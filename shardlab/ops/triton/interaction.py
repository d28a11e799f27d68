"""Triton face of the dot interaction; formulas in `shardlab.ops.interaction`.

One program per sample (and, backward, per block of columns) keeps the sample's vectors X[N, D] and
the N x N matrix of products in registers; a pair (i, j), i < j, is element
D + i (2 N - i - 1) / 2 + j - i - 1 of the sample's output row.

Source: Naumov et al., arXiv 1906.00091.
"""


from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SMALLEST_DOT = 16  # rows and columns that tl.dot asks for
_MOST_COLUMNS = 64  # of X that a program holds at a time


@triton.jit
def _load_rows(bottom_ptr, pooled_ptr, sample, rows, columns, VECTORS: tl.constexpr,
               D: tl.constexpr):
    """X[rows, columns] of a sample; zero outside [VECTORS, D]."""
    inside = columns[None, :] < D
    first = tl.load(bottom_ptr + sample * D + columns[None, :],
                    mask=inside & (rows[:, None] == 0), other=0.0)
    rest = tl.load(pooled_ptr + (sample * (VECTORS - 1) + rows[:, None] - 1) * D + columns[None, :],
                   mask=inside & (rows[:, None] > 0) & (rows[:, None] < VECTORS), other=0.0)
    return first + rest


@triton.jit
def _forward_kernel(bottom_ptr, pooled_ptr, out_ptr, VECTORS: tl.constexpr, D: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    products = tl.zeros((ROWS, ROWS), tl.float32)
    out_row = out_ptr + sample * (D + VECTORS * (VECTORS - 1) // 2)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = _load_rows(bottom_ptr, pooled_ptr, sample, rows, columns, VECTORS, D)
        products += tl.dot(x, tl.trans(x), input_precision="ieee")
        copied = tl.load(bottom_ptr + sample * D + columns, mask=columns < D, other=0.0)
        tl.store(out_row + columns, copied, mask=columns < D)
    i, j = rows[:, None], rows[None, :]
    place = D + i * (2 * VECTORS - i - 1) // 2 + j - i - 1
    tl.store(out_row + place, products, mask=(i < j) & (j < VECTORS))


@triton.jit
def _backward_kernel(grad_ptr, bottom_ptr, pooled_ptr, grad_bottom_ptr, grad_pooled_ptr,
                     VECTORS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    grad_row = grad_ptr + sample * (D + VECTORS * (VECTORS - 1) // 2)
    i = tl.minimum(rows[:, None], rows[None, :])
    j = tl.maximum(rows[:, None], rows[None, :])
    place = D + i * (2 * VECTORS - i - 1) // 2 + j - i - 1
    pairs = tl.load(grad_row + place, mask=(i < j) & (j < VECTORS), other=0.0)
    x = _load_rows(bottom_ptr, pooled_ptr, sample, rows, columns, VECTORS, D)
    grad_x = tl.dot(pairs, x, input_precision="ieee")

    inside = columns[None, :] < D
    first = inside & (rows[:, None] == 0)
    grad_x += tl.load(grad_row + columns[None, :], mask=first, other=0.0)
    tl.store(grad_bottom_ptr + sample * D + columns[None, :] + 0 * rows[:, None], grad_x,
             mask=first)
    tl.store(grad_pooled_ptr + (sample * (VECTORS - 1) + rows[:, None] - 1) * D + columns[None, :],
             grad_x, mask=inside & (rows[:, None] > 0) & (rows[:, None] < VECTORS))


def _tile(vectors: int, columns: int) -> tuple[int, int]:
    """Rows and columns of X that a program works on."""
    return (max(_SMALLEST_DOT, triton.next_power_of_2(vectors)),
            min(_MOST_COLUMNS, max(_SMALLEST_DOT, triton.next_power_of_2(columns))))


def forward(bottom: Tensor, pooled: Tensor, num_features: int) -> Tensor:
    """Output [B, D + F (F + 1) / 2] of contiguous fp32 ``bottom`` [B, D], ``pooled`` [B, F D]."""
    (batch, columns), vectors = bottom.shape, num_features + 1
    out = torch.empty(batch, columns + vectors * num_features // 2, device=bottom.device)
    if batch:
        rows, block = _tile(vectors, columns)
        _forward_kernel[(batch,)](bottom, pooled, out, VECTORS=vectors, D=columns, ROWS=rows,
                                  COLUMNS=block)
    return out


def backward(grad: Tensor, bottom: Tensor, pooled: Tensor,
             num_features: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``bottom`` and ``pooled`` from the contiguous fp32 ``grad`` of the output."""
    (batch, columns), vectors = bottom.shape, num_features + 1
    grad_bottom, grad_pooled = torch.empty_like(bottom), torch.empty_like(pooled)
    if batch:
        rows, block = _tile(vectors, columns)
        grid = (batch, triton.cdiv(columns, block))
        _backward_kernel[grid](grad, bottom, pooled, grad_bottom, grad_pooled, VECTORS=vectors,
                               D=columns, ROWS=rows, COLUMNS=block)
    return grad_bottom, grad_pooled
