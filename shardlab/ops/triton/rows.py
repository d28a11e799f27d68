"""Triton faces of gather, pool, sum and update of rows; contracts in `shardlab.ops.rows`.

One launch for the jobs of all tables: a program is a tile of R rows x C columns of one job. Rows
are found with int64 offsets; sums run in entry order, and no product is contracted into a fused
multiply-add, so that a result depends on its inputs alone. Source: own.
"""


from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.step_parameters import RULES, StepParameters
from shardlab.ops.triton.sums import (
    CHUNK,
    COLUMNS,
    COUNT,
    START,
    Chunks,
    sum_chunks,
    sum_entries,
)
from shardlab.ops.triton.tiles import Jobs, alignment, build_jobs, find_tile
from shardlab.ops.unique import Uniques

_FP32_BYTES = 4
#: Elements of a tile: 16 a thread where rows are only copied, 8 where sums are held.
_COPY_ELEMENTS, SUM_ELEMENTS = 2048, 1024
#: Numbers of a pool job that reach pointers: base, step, columns, out start, out step.
_POOL_POINTERS = (0, 1, 2, 8, 9)

SGD, ADAGRAD, ROW_WISE_ADAGRAD, ADAM, ROW_WISE_ADAM = (
    tl.constexpr(RULES[kind])
    for kind in ("sgd", "adagrad", "row_wise_adagrad", "adam", "row_wise_adam"))


def _as_fp32(arena: Tensor) -> Tensor:
    """The arena as fp32; offsets and lengths are multiples of 4 bytes."""
    return arena[:arena.numel() // _FP32_BYTES * _FP32_BYTES].view(torch.float32)


def _elements(byte_numbers: Tensor) -> Tensor:
    """Offsets or lengths in bytes as fp32 elements."""
    return byte_numbers // _FP32_BYTES


# ---------------------------------------------------------------- gather
def gather_rows(arena: Tensor, blocks: Blocks, segments: Tensor, ids: Tensor, out: Tensor) -> None:
    """out[out start + i * columns + c] = arena[offset + ids[start + i] * length + c]."""
    if len(segments) == 0:
        return
    block, start, count, out_start = segments.unbind(1)
    columns = blocks.table[block, 4]
    offset, length = _elements(blocks.table[block, :2]).unbind(1)
    fields = torch.stack([start, count, columns, offset, length, out_start], 1)
    jobs = build_jobs(fields, count, columns, _COPY_ELEMENTS, out.device)
    if jobs.tiles:
        _gather_kernel[(jobs.tiles,)](_as_fp32(arena), jobs.table, ids, out, *jobs.search, R=jobs.R,
                                      C=jobs.C, ALIGN=alignment(fields[:, 2:]),
                                      enable_fp_fusion=False)


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _gather_kernel(arena, table, ids, out, num_jobs, job_steps, R: tl.constexpr, C: tl.constexpr,
                   ALIGN: tl.constexpr):
    """Job: (first tile, start, count, columns, offset, length, out start)."""
    number, row = find_tile(table, 7, num_jobs, job_steps, R)
    job = table + number * 7
    columns = tl.multiple_of(tl.load(job + 3), ALIGN)
    offset = tl.multiple_of(tl.load(job + 4), ALIGN)
    length = tl.multiple_of(tl.load(job + 5), ALIGN)
    target = tl.multiple_of(tl.load(job + 6), ALIGN) + row * columns
    live = row < tl.load(job + 2)
    at = offset + tl.load(ids + tl.load(job + 1) + row, mask=live, other=0) * length
    c = tl.arange(0, C)[None, :]
    inside = live[:, None] & (c < columns)
    tl.store(out + target[:, None] + c, tl.load(arena + at[:, None] + c, mask=inside), mask=inside)


# ---------------------------------------------------------------- pool
def pool_rows(source: Tensor, jobs: Tensor, index: Tensor, offsets: Tensor | None,
              weights: Tensor | None, out: Tensor) -> None:
    """out[bag] (+)= sum over p of the bag of weights[p] * source[base + index[p] * step + c]."""
    if len(jobs) == 0:
        return
    cut = build_jobs(jobs, jobs[:, 3], jobs[:, 2], SUM_ELEMENTS, out.device)
    if cut.tiles:
        _pool_kernel[(cut.tiles,)](source, cut.table, index, index if offsets is None else offsets,
                                   source if weights is None else weights, out, *cut.search,
                                   WEIGHTED=weights is not None, R=cut.R, C=cut.C,
                                   ALIGN=alignment(jobs[:, _POOL_POINTERS]),
                                   enable_fp_fusion=False)


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _pool_kernel(source, table, index, offsets, weights, out, num_jobs, job_steps,
                 WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):
    """Job: (first tile, then the eleven numbers of a job of `pool_rows`)."""
    number, bag = find_tile(table, 12, num_jobs, job_steps, R)
    job = table + number * 12
    base = tl.multiple_of(tl.load(job + 1), ALIGN)
    step = tl.multiple_of(tl.load(job + 2), ALIGN)
    columns = tl.multiple_of(tl.load(job + 3), ALIGN)
    live = bag < tl.load(job + 4)
    length = tl.load(job + 7)
    ragged = tl.where(live, length, 0) < 0
    edge = offsets + tl.load(job + 6) + bag
    fixed = tl.load(job + 5) + bag * length
    begin = tl.where(ragged, tl.load(edge, mask=ragged, other=0), fixed)
    end = tl.where(ragged, tl.load(edge + 1, mask=ragged, other=0), fixed + length)
    size = tl.where(live, end - begin, 0)
    c = tl.arange(0, C)[None, :]
    total = tl.zeros([R, C], dtype=tl.float32)
    for k in tl.range(0, tl.max(size), loop_unroll_factor=4):
        row = tl.load(index + begin + k, mask=k < size, other=-1)
        value = tl.load(source + (base + row * step)[:, None] + c,
                        mask=(row >= 0)[:, None] & (c < columns), other=0.0)
        if WEIGHTED:
            value = value * tl.load(weights + begin + k, mask=row >= 0, other=0.0)[:, None]
        total += value
    divisor = tl.maximum(size * tl.load(job + 8), 1).to(tl.float32)
    total = tl.div_rn(total, divisor[:, None])
    target = out + (tl.multiple_of(tl.load(job + 9), ALIGN)
                    + bag * tl.multiple_of(tl.load(job + 10), ALIGN))[:, None] + c
    inside = live[:, None] & (c < columns)
    add = tl.where(live, tl.load(job + 11), 0) != 0
    before = tl.load(target, mask=add[:, None] & inside, other=0.0)
    tl.store(target, before + total, mask=inside)


# ---------------------------------------------------------------- sums per unique id
def sum_rows(source: Tensor, uniques: Uniques, weights: Tensor | None, pieces: Tensor,
             scale: float, out: Tensor) -> None:
    """out[out start + i * out step + c] = scale * sum of the entries of unique start + i."""
    if len(pieces) == 0:
        return
    jobs = build_jobs(pieces, pieces[:, 1], pieces[:, 2], SUM_ELEMENTS, out.device)
    if jobs.tiles == 0:
        return
    chunks = sum_chunks(source, uniques, weights, pieces, jobs)
    _sum_kernel[(jobs.tiles,)](*entries_of(source, uniques, weights, chunks), jobs.table, out,
                               scale, *jobs.search, **constants_of(jobs, chunks, weights))


def entries_of(source: Tensor, uniques: Uniques, weights: Tensor | None,
             chunks: Chunks | None) -> tuple[Tensor, ...]:
    """(source, starts, sources, weights, slots, sums): what `sum_entries` reads."""
    return (source, uniques.starts, uniques.sources, source if weights is None else weights,
            uniques.starts if chunks is None else chunks.slots,
            source if chunks is None else chunks.sums)


def constants_of(jobs: Jobs, chunks: Chunks | None,
                 weights: Tensor | None) -> dict[str, int | bool]:
    """What kernels that sum entries are compiled for."""
    return {"CHUNKED": chunks is not None, "WIDTH": 1 if chunks is None else chunks.sums.shape[1],
            "CHUNK": CHUNK, "WEIGHTED": weights is not None, "R": jobs.R, "C": jobs.C,
            "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _sum_kernel(source, starts, sources, weights, slots, sums, table, out, scale, num_jobs,
                job_steps, CHUNKED: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
                WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Job: (first tile, start, count, columns, shift, out start, out step)."""
    number, row = find_tile(table, 7, num_jobs, job_steps, R)
    job = table + number * 7
    live = row < tl.load(job + COUNT)
    c = tl.arange(0, C)[None, :]
    inside = c < tl.load(job + COLUMNS)
    total = sum_entries(source, starts, sources, weights, slots, sums, job, number,
                        tl.load(job + START) + row, live, c, inside, CHUNKED, WIDTH, CHUNK,
                        WEIGHTED, R, C)
    at = tl.load(job + 5) + row * tl.load(job + 6)
    tl.store(out + at[:, None] + c, total * scale, mask=live[:, None] & inside)


# ---------------------------------------------------------------- update
def update_rows(arena: Tensor, blocks: Blocks, uniques: Uniques, weights: Tensor | None,
                grads: Tensor, step: StepParameters, row_squares: Tensor | None = None) -> None:
    """g = clip(scale * sum of the row's entries); one step of the rule on row and state, in place.

    Formulas of the rules: `_step_rows` of `shardlab.ops.rows`.
    """
    start = uniques.splits[:-1]
    if len(start) == 0:
        return
    count = uniques.splits[1:] - start
    columns, no_shift = blocks.table[:, 4], torch.zeros_like(start)
    fields = torch.stack([start, count, columns, no_shift,
                          *_elements(blocks.table[:, :4]).unbind(1)], 1)
    jobs = build_jobs(fields, count, columns, SUM_ELEMENTS, grads.device)
    if jobs.tiles == 0:
        return
    chunks = sum_chunks(grads, uniques, weights, fields, jobs)
    given = row_squares is not None
    _update_kernel[(jobs.tiles,)](*entries_of(grads, uniques, weights, chunks), jobs.table,
                                  uniques.ids, row_squares if given else grads, _as_fp32(arena),
                                  *numbers_of(step), *jobs.search, RULE=RULES[step.kind],
                                  GIVEN=given, **constants_of(jobs, chunks, weights))


def numbers_of(step: StepParameters) -> tuple[float, ...]:
    """(lr, eps, beta1, 1 - beta1, beta2, 1 - beta2, weight decay, scale, clip, bias1, bias2)."""
    clip = step.clip_value if step.clip_value > 0 else math.inf
    # 1 - beta is taken in fp64 here, as torch's optimisers do: in fp32 0.999 loses 1.3e-5 of it.
    return (step.lr, step.eps, step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2,
            step.weight_decay, step.scale, clip, step.bias1, step.bias2)


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _update_kernel(source, starts, sources, weights, slots, sums, table, ids, squares, arena, lr,
                   eps, beta1, rest1, beta2, rest2, weight_decay, scale, clip, bias1, bias2,
                   num_jobs, job_steps, RULE: tl.constexpr, GIVEN: tl.constexpr,
                   CHUNKED: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
                   WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Job: (first tile, start, count, columns, 0, then offset and length of rows and of states)."""
    number, row = find_tile(table, 9, num_jobs, job_steps, R)
    job = table + number * 9
    live = row < tl.load(job + COUNT)
    columns = tl.load(job + COLUMNS)
    c = tl.arange(0, C)[None, :]
    unique = tl.load(job + START) + row
    grad = sum_entries(source, starts, sources, weights, slots, sums, job, number, unique, live, c,
                       c < columns, CHUNKED, WIDTH, CHUNK, WEIGHTED, R, C) * scale
    # Written as comparisons, which keep a NaN; a minimum would turn it into the bound.
    grad = tl.where(grad > clip, clip, tl.where(grad < -clip, -clip, grad))
    id = tl.load(ids + unique, mask=live, other=0)
    rows = arena + (tl.load(job + 5) + id * tl.load(job + 6))[:, None] + c
    row_state = arena + tl.load(job + 7) + id * tl.load(job + 8)
    state = row_state[:, None] + c
    inside = live[:, None] & (c < columns)
    weight = tl.load(rows, mask=inside, other=0.0)
    row_square = mean_square(grad, columns)
    if GIVEN:
        whole = tl.load(squares + unique, mask=live, other=-1.0)
        row_square = tl.where(whole < 0, row_square, whole)
    first = grad
    second = grad
    single = row_square
    if (RULE == ADAGRAD) | (RULE == ADAM) | (RULE == ROW_WISE_ADAM):
        first = tl.load(state, mask=inside, other=0.0)
    if RULE == ADAM:
        second = tl.load(state + columns, mask=inside, other=0.0)
    if RULE == ROW_WISE_ADAGRAD:
        single = tl.load(row_state, mask=live, other=0.0)
    if RULE == ROW_WISE_ADAM:
        single = tl.load(row_state + columns, mask=live, other=0.0)
    weight, first, second, single = step_rule(
        weight, grad, row_square, first, second, single, lr, eps, beta1, rest1, beta2, rest2,
        weight_decay, bias1, bias2, RULE)
    if (RULE == ADAGRAD) | (RULE == ADAM) | (RULE == ROW_WISE_ADAM):
        tl.store(state, first, mask=inside)
    if RULE == ADAM:
        tl.store(state + columns, second, mask=inside)
    if RULE == ROW_WISE_ADAGRAD:
        tl.store(row_state, single, mask=live)
    if RULE == ROW_WISE_ADAM:
        tl.store(row_state + columns, single, mask=live)
    tl.store(rows, weight, mask=inside)


@triton.jit
def step_rule(weight, grad, row_square, first, second, single, lr, eps, beta1, rest1, beta2, rest2,
              weight_decay, bias1, bias2, RULE: tl.constexpr):
    """One step of a rule: new (weight, first, second, single).

    weight, grad fp32 [R, C]; first, second: states by element, in that order, [R, C]; single: state
    by row, [R]. A rule leaves the states alone that it does not have.
    """
    if RULE == SGD:
        step = lr * (grad + weight_decay * weight)
    elif RULE == ADAGRAD:
        first += grad * grad
        step = tl.div_rn(lr * grad, tl.sqrt_rn(first) + eps)
    elif RULE == ROW_WISE_ADAGRAD:
        single += row_square
        step = tl.div_rn(lr, tl.sqrt_rn(single) + eps)[:, None] * grad
    else:
        first = first * beta1 + grad * rest1
        if RULE == ADAM:
            second = second * beta2 + grad * grad * rest2
            root = tl.sqrt_rn(tl.div_rn(second, bias2)) + eps
        else:
            single = single * beta2 + row_square * rest2
            root = (tl.sqrt_rn(tl.div_rn(single, bias2)) + eps)[:, None]
        step = tl.div_rn(lr * tl.div_rn(first, bias1), root)
    return weight - step, first, second, single


@triton.jit
def mean_square(grad, columns):
    """Mean of grad^2 over the columns, [R]; grad is 0 beyond them."""
    return tl.div_rn(tl.sum(grad * grad, axis=1), columns.to(tl.float32))
