"""Triton face of tensor-train rows and gradients; formulas in `shardlab.ops.tensor_train`.

A level multiplies the product of every prefix, [LEAD, INNER], with a slice of its core,
[INNER, WIDTH]. One program per prefix (rows, and what goes back to the parent) or per slice
(gradients, over the prefixes that meet it, in order), so that sums have a fixed order and no
atomics. A core's slices are read by strides: the last core lies with its columns first.

Source: TT-Rec, arXiv 2101.11714.
"""


from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlab.ops.tensor_train_types import CoreGradients, TensorTrain, prefix_levels

#: Columns of a slice that a program of gradients holds at a time.
_COLUMNS = 64


@triton.jit
def _multiply_kernel(left_ptr, parent_ptr, core_ptr, digit_ptr, out_ptr, INNER, WIDTH, elements,
                     step_inner, step_width, LEAD: tl.constexpr, LEADS: tl.constexpr,
                     COLUMNS: tl.constexpr):
    """out[node] = left[parent] @ core[digit], of columns [program * COLUMNS, + COLUMNS)."""
    node = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, LEADS)
    left = left_ptr + tl.load(parent_ptr + node) * LEAD * INNER
    core = core_ptr + tl.load(digit_ptr + node) * elements
    total = tl.zeros((LEADS, COLUMNS), tl.float32)
    for inner in range(INNER):
        a = tl.load(left + rows * INNER + inner, mask=rows < LEAD, other=0.0)
        b = tl.load(core + inner * step_inner + columns * step_width, mask=columns < WIDTH,
                    other=0.0)
        total += a[:, None] * b[None, :]
    inside = (rows < LEAD)[:, None] & (columns < WIDTH)[None, :]
    tl.store(out_ptr + (node * LEAD + rows[:, None]) * WIDTH + columns[None, :], total,
             mask=inside)


@triton.jit
def _slices_kernel(left_ptr, parent_ptr, grad_ptr, nodes_ptr, starts_ptr, out_ptr, INNER, WIDTH,
                   LEAD, elements, step_inner, step_width, INNERS: tl.constexpr,
                   COLUMNS: tl.constexpr):
    """out[group] = sum over the group's nodes of left[parent]^T @ grad[node]."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inners = tl.arange(0, INNERS)
    total = tl.zeros((INNERS, COLUMNS), tl.float32)
    for place in range(tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)):
        node = tl.load(nodes_ptr + place)
        left = left_ptr + tl.load(parent_ptr + node) * LEAD * INNER
        for row in range(LEAD):
            a = tl.load(left + row * INNER + inners, mask=inners < INNER, other=0.0)
            b = tl.load(grad_ptr + (node * LEAD + row) * WIDTH + columns, mask=columns < WIDTH,
                        other=0.0)
            total += a[:, None] * b[None, :]
    inside = (inners < INNER)[:, None] & (columns < WIDTH)[None, :]
    tl.store(out_ptr + group * elements + inners[:, None] * step_inner
             + columns[None, :] * step_width, total, mask=inside)


@triton.jit
def _parents_kernel(grad_ptr, core_ptr, digit_ptr, children_ptr, out_ptr, INNER, WIDTH, elements,
                    step_inner, step_width, LEAD: tl.constexpr, LEADS: tl.constexpr,
                    INNERS: tl.constexpr):
    """out[parent] = sum over its children of grad[child] @ core[digit]^T."""
    parent = tl.program_id(0).to(tl.int64)
    rows, inners = tl.arange(0, LEADS), tl.arange(0, INNERS)
    total = tl.zeros((LEADS, INNERS), tl.float32)
    for child in range(tl.load(children_ptr + parent), tl.load(children_ptr + parent + 1)):
        core = core_ptr + tl.load(digit_ptr + child) * elements
        for column in range(WIDTH):
            a = tl.load(grad_ptr + (child * LEAD + rows) * WIDTH + column, mask=rows < LEAD,
                        other=0.0)
            b = tl.load(core + inners * step_inner + column * step_width, mask=inners < INNER,
                        other=0.0)
            total += a[:, None] * b[None, :]
    inside = (rows < LEAD)[:, None] & (inners < INNER)[None, :]
    tl.store(out_ptr + (parent * LEAD + rows[:, None]) * INNER + inners[None, :], total,
             mask=inside)


class _Level:
    """Sizes and strides of one core's products."""

    def __init__(self, train: TensorTrain, number: int) -> None:
        inner, _, columns, after = train.shape.core_shapes[number]
        self.core, self.inner, self.width = train.cores[number], inner, columns * after
        self.elements, self.lead = inner * columns * after, 1
        for factor in train.shape.column_factors[:number]:
            self.lead *= factor
        last = number == len(train.cores) - 1
        self.steps = (1, inner) if last else (self.width, 1)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """What every kernel takes."""
        return (self.inner, self.width, self.elements, *self.steps)

    def columns(self) -> int:
        """Columns that a program holds."""
        return min(_COLUMNS, triton.next_power_of_2(self.width))


def _forward(train: TensorTrain, levels: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Products of every level, flat; the last one is the rows."""
    products = [train.cores[0][levels[0][1]].contiguous()]
    for number, (parent, digit) in enumerate(levels[1:], 1):
        level = _Level(train, number)
        out = torch.empty(digit.numel(), level.lead * level.width, device=digit.device)
        grid = (digit.numel(), triton.cdiv(level.width, level.columns()))
        _multiply_kernel[grid](products[-1], parent, level.core, digit, out, *level.sizes,
                               LEAD=level.lead, LEADS=triton.next_power_of_2(level.lead),
                               COLUMNS=level.columns())
        products.append(out)
    return products


def tensor_train_rows(train: TensorTrain, ids: Tensor, out: Tensor) -> None:
    """See `shardlab.ops.tensor_train.tensor_train_rows`."""
    if ids.numel():
        out.copy_(_forward(train, prefix_levels(train.shape, ids))[-1])


def tensor_train_gradients(train: TensorTrain, ids: Tensor, grads: Tensor) -> CoreGradients:
    """See `shardlab.ops.tensor_train.tensor_train_gradients`."""
    if not ids.numel():
        return CoreGradients(tuple(ids[:0] for _ in train.cores),
                             tuple(core[:0] for core in train.cores))
    levels = prefix_levels(train.shape, ids)
    products, up = _forward(train, levels[:-1]), grads
    touched: list[Tensor] = []
    found: list[Tensor] = []
    for number in range(len(levels) - 1, 0, -1):
        (parent, digit), level = levels[number], _Level(train, number)
        nodes = torch.argsort(digit, stable=True)
        slices, counts = torch.unique_consecutive(digit[nodes], return_counts=True)
        out = torch.empty(slices.numel(), level.elements, device=grads.device)
        grid = (slices.numel(), triton.cdiv(level.width, level.columns()))
        _slices_kernel[grid](products[number - 1], parent, up, nodes, _edges(counts), out,
                             level.inner, level.width, level.lead, level.elements, *level.steps,
                             INNERS=triton.next_power_of_2(level.inner), COLUMNS=level.columns())
        touched.append(slices)
        found.append(out)
        children = _edges(torch.unique_consecutive(parent, return_counts=True)[1])
        below = torch.empty(children.numel() - 1, level.lead * level.inner, device=grads.device)
        _parents_kernel[(children.numel() - 1,)](
            up, level.core, digit, children, below, *level.sizes, LEAD=level.lead,
            LEADS=triton.next_power_of_2(level.lead), INNERS=triton.next_power_of_2(level.inner))
        up = below
    touched.append(levels[0][1])
    found.append(up)
    return CoreGradients(tuple(reversed(touched)), tuple(reversed(found)))


def _edges(counts: Tensor) -> Tensor:
    """int64 [n + 1]: where each of n runs starts, and the end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
