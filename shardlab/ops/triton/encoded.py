"""Triton faces of gather, pool, update and moves of rows in any precision; contracts in
`shardlab.ops.rows` and `shardlab.ops.moves`.

Blocks of one kind (codecs of payload and state, rounding) share a launch, whose kernel is compiled
for that kind. Offsets are bytes; a block's are multiples of the bytes of its elements. Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlab.codecs import CODECS, signed
from shardlab.ops.blocks import Blocks
from shardlab.ops.records import MoveEnd
from shardlab.ops.step_parameters import RULES, StepParameters
from shardlab.ops.triton.codecs import (
    BF16,
    FP32,
    INT4,
    PART_SIZE,
    load_plain,
    load_rows,
    random_bits,
    row_words,
    store_plain,
    store_rows,
)
from shardlab.ops.triton.rows import (
    ADAGRAD,
    ADAM,
    ROW_WISE_ADAGRAD,
    ROW_WISE_ADAM,
    SUM_ELEMENTS,
    constants_of,
    entries_of,
    mean_square,
    numbers_of,
    step_rule,
)
from shardlab.ops.triton.sums import COLUMNS, COUNT, START, sum_chunks, sum_entries
from shardlab.ops.triton.tiles import build_jobs, find_tile
from shardlab.ops.unique import Uniques

_COPY_ELEMENTS = 2048


def _groups(keys: list[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """(key, positions that have it) for every distinct row of the columns ``keys``."""
    kinds, which = torch.stack(keys, 1).unique(dim=0, return_inverse=True)
    for number, kind in enumerate(kinds.tolist()):
        yield kind, (which == number).nonzero()[:, 0]


def _widths(columns: Tensor, *codecs: int) -> Tensor:
    """Columns as tiles want them: int4 packs pairs."""
    return columns.clamp(min=2) if CODECS["int4"] in codecs else columns


# ---------------------------------------------------------------- gather
def gather_rows(arena: Tensor, blocks: Blocks, segments: Tensor, ids: Tensor, out: Tensor) -> None:
    """out[out start + i * columns + c] = decoded row ids[start + i] of the segment's block."""
    if len(segments) == 0:
        return
    assert blocks.encodings is not None
    block, start, count, out_start = segments.unbind(1)
    columns = blocks.table[block, 4]
    fields = torch.stack([start, count, columns, *blocks.table[block, :2].unbind(1), out_start], 1)
    for (codec,), at in _groups([blocks.encodings[block, 0]]):
        jobs = build_jobs(fields[at], count[at], _widths(columns[at], codec), _COPY_ELEMENTS,
                          out.device)
        if jobs.tiles:
            _gather_kernel[(jobs.tiles,)](arena, jobs.table, ids, out, *jobs.search, CODEC=codec,
                                          R=jobs.R, C=jobs.C, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _gather_kernel(arena, table, ids, out, num_jobs, job_steps, CODEC: tl.constexpr,
                   R: tl.constexpr, C: tl.constexpr):
    """Job: (first tile, start, count, columns, offset, step, out start)."""
    number, row = find_tile(table, 7, num_jobs, job_steps, R)
    job = table + number * 7
    columns = tl.load(job + 3)
    live = row < tl.load(job + 2)
    place = tl.load(ids + tl.load(job + 1) + row, mask=live, other=0)
    c = tl.arange(0, C)[None, :]
    inside = live[:, None] & (c < columns)
    rows = load_rows(arena + tl.load(job + 4) + place * tl.load(job + 5), columns, c, inside, CODEC)
    target = tl.load(job + 6) + row * columns
    tl.store(out + target[:, None] + c, rows, mask=inside)


# ---------------------------------------------------------------- pool
def pool_blocks(arena: Tensor, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                weights: Tensor | None, out: Tensor) -> None:
    """out[bag] (+)= sum over p of the bag of weights[p] * decoded row at base + index[p] * step."""
    if len(jobs) == 0:
        return
    for (codec,), at in _groups([jobs[:, 11]]):
        some = jobs[at, :11].contiguous()
        cut = build_jobs(some, some[:, 3], _widths(some[:, 2], codec), SUM_ELEMENTS, out.device)
        if cut.tiles:
            _pool_kernel[(cut.tiles,)](
                arena, cut.table, index, index if offsets is None else offsets,
                out if weights is None else weights, out, *cut.search, CODEC=codec,
                WEIGHTED=weights is not None, R=cut.R, C=cut.C, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _pool_kernel(arena, table, index, offsets, weights, out, num_jobs, job_steps,
                 CODEC: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Job: (first tile, then the eleven numbers of a job of `pool_blocks`)."""
    number, bag = find_tile(table, 12, num_jobs, job_steps, R)
    job = table + number * 12
    base = arena + tl.load(job + 1)
    step = tl.load(job + 2)
    columns = tl.load(job + 3)
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
        kept = row >= 0
        inside = kept[:, None] & (c < columns)
        value = load_rows(base + tl.where(kept, row, 0) * step, columns, c, inside, CODEC)
        if WEIGHTED:
            value = value * tl.load(weights + begin + k, mask=kept, other=0.0)[:, None]
        total += tl.where(inside, value, 0.0)
    divisor = tl.maximum(size * tl.load(job + 8), 1).to(tl.float32)
    total = tl.div_rn(total, divisor[:, None])
    target = out + (tl.load(job + 9) + bag * tl.load(job + 10))[:, None] + c
    inside = live[:, None] & (c < columns)
    add = tl.where(live, tl.load(job + 11), 0) != 0
    before = tl.load(target, mask=add[:, None] & inside, other=0.0)
    tl.store(target, before + total, mask=inside)


# ---------------------------------------------------------------- update
def update_rows(arena: Tensor, blocks: Blocks, uniques: Uniques, weights: Tensor | None,
                grads: Tensor, step: StepParameters, row_squares: Tensor | None = None) -> None:
    """Rows and states are decoded, stepped in registers and encoded to their place."""
    if len(blocks.table) == 0:
        return
    assert blocks.encodings is not None
    start = uniques.splits[:-1]
    count = uniques.splits[1:] - start
    columns, kinds = blocks.table[:, 4], blocks.encodings
    fields = torch.stack([start, count, columns, torch.zeros_like(start),
                          *blocks.table[:, :4].unbind(1), *_random_fields(kinds, step.key)], 1)
    squares, rows = (grads if row_squares is None else row_squares,
                     uniques.ids if step.rows is None else step.rows)
    for (codec, state, stochastic), at in _groups([kinds[:, 0], kinds[:, 1], kinds[:, 7]]):
        some = fields[at].contiguous()
        jobs = build_jobs(some, some[:, 1], _widths(some[:, 2], codec), SUM_ELEMENTS, grads.device)
        if jobs.tiles == 0:
            continue
        chunks = sum_chunks(grads, uniques, weights, some, jobs)
        _update_kernel[(jobs.tiles,)](
            *entries_of(grads, uniques, weights, chunks), jobs.table, uniques.ids, rows, squares,
            arena, *numbers_of(step), *jobs.search, RULE=RULES[step.kind],
            GIVEN=row_squares is not None, NUMBERED=step.rows is not None, CODEC=codec, STATE=state,
            STOCHASTIC=bool(stochastic), **constants_of(jobs, chunks, weights))


def _random_fields(encodings: Tensor, key: int) -> list[Tensor]:
    """(key of the table's random bits, first row, first column) of blocks."""
    keys = [signed(key ^ table) for table in encodings[:, 6].tolist()]
    return [torch.tensor(keys, dtype=torch.int64), encodings[:, 4], encodings[:, 5]]


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _update_kernel(source, starts, sources, weights, slots, sums, table, ids, row_ids, squares,
                   arena, lr, eps, beta1, rest1, beta2, rest2, weight_decay, scale, clip, bias1,
                   bias2, num_jobs, job_steps, RULE: tl.constexpr, GIVEN: tl.constexpr,
                   NUMBERED: tl.constexpr, CODEC: tl.constexpr, STATE: tl.constexpr,
                   STOCHASTIC: tl.constexpr, CHUNKED: tl.constexpr, WIDTH: tl.constexpr,
                   CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Job: (first tile, start, count, columns, 0, offset and step in bytes of rows and of states,
    key, first row, first column)."""
    number, row = find_tile(table, 12, num_jobs, job_steps, R)
    job = table + number * 12
    live = row < tl.load(job + COUNT)
    columns = tl.load(job + COLUMNS)
    c = tl.arange(0, C)[None, :]
    unique = tl.load(job + START) + row
    grad = sum_entries(source, starts, sources, weights, slots, sums, job, number, unique, live, c,
                       c < columns, CHUNKED, WIDTH, CHUNK, WEIGHTED, R, C) * scale
    # Written as comparisons, which keep a NaN; a minimum would turn it into the bound.
    grad = tl.where(grad > clip, clip, tl.where(grad < -clip, -clip, grad))
    id = tl.load(ids + unique, mask=live, other=0)
    if NUMBERED:
        low, high = row_words(tl.load(job + 9), tl.load(row_ids + unique, mask=live, other=0))
    else:
        low, high = row_words(tl.load(job + 9), tl.load(job + 10) + id)
    first_column = tl.load(job + 11)
    record = arena + tl.load(job + 5) + id * tl.load(job + 6)
    state = arena + tl.load(job + 7) + id * tl.load(job + 8)
    inside = live[:, None] & (c < columns)
    weight = load_rows(record, columns, c, inside, CODEC)
    row_square = mean_square(grad, columns)
    if GIVEN:
        whole = tl.load(squares + unique, mask=live, other=-1.0)
        row_square = tl.where(whole < 0, row_square, whole)
    # States by element [R, C], and by row [R]; element-wise ones come first.
    first = grad
    second = grad
    single = row_square
    if (RULE == ADAGRAD) | (RULE == ADAM) | (RULE == ROW_WISE_ADAM):
        first = load_plain(state[:, None], c, inside, STATE)
    if RULE == ADAM:
        second = load_plain(state[:, None], columns + c, inside, STATE)
    if RULE == ROW_WISE_ADAGRAD:
        single = load_plain(state, 0 * row, live, STATE)
    if RULE == ROW_WISE_ADAM:
        single = load_plain(state, columns + 0 * row, live, STATE)
    weight, first, second, single = step_rule(
        weight, grad, row_square, first, second, single, lr, eps, beta1, rest1, beta2, rest2,
        weight_decay, bias1, bias2, RULE)
    if (RULE == ADAGRAD) | (RULE == ADAM) | (RULE == ROW_WISE_ADAM):
        _store_state(state, 0 * columns, first, c, inside, low, high, first_column, 1, STATE,
                     STOCHASTIC)
    if RULE == ADAM:
        _store_state(state, columns, second, c, inside, low, high, first_column, 2, STATE,
                     STOCHASTIC)
    if RULE == ROW_WISE_ADAGRAD:
        _store_single(state, 0 * row, single, live, low, high, 1, STATE, STOCHASTIC)
    if RULE == ROW_WISE_ADAM:
        _store_single(state, columns + 0 * row, single, live, low, high, 2, STATE, STOCHASTIC)
    store_rows(record, weight, columns, c, inside, low, high, first_column, CODEC, STOCHASTIC)


@triton.jit
def _store_state(state, element, values, c, inside, low, high, first_column, PART: tl.constexpr,
                 STATE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """One part of the states: an element per column."""
    counter = (first_column + c).to(tl.uint32) + PART * PART_SIZE
    random = random_bits(low[:, None], high[:, None], counter)
    store_plain(state[:, None], element + c, values, random, inside, STATE, STOCHASTIC)


@triton.jit
def _store_single(state, element, values, live, low, high, PART: tl.constexpr, STATE: tl.constexpr,
                  STOCHASTIC: tl.constexpr):
    """The rows' own elements, which have no column."""
    random = random_bits(low, high, tl.full(low.shape, PART * PART_SIZE, tl.uint32))
    store_plain(state, element, values, random, live, STATE, STOCHASTIC)


# ---------------------------------------------------------------- moves
def move_rows(source: MoveEnd, target: MoveEnd, segments: Tensor, key: int,
              rows: Tensor | None) -> None:
    """Copies or converts records; a launch per kind of pair."""
    if len(segments) == 0:
        return
    old, new, start, count = segments.unbind(1)
    from_kind, to_kind = source.blocks.encodings[old], target.blocks.encodings[new]  # type: ignore[index]
    columns = target.blocks.table[new, 4]
    fields = torch.stack([start, count, columns, *source.blocks.table[old, :4].unbind(1),
                          *target.blocks.table[new, :4].unbind(1), *_random_fields(to_kind, key),
                          to_kind[:, 2], to_kind[:, 3]], 1)
    kinds = [from_kind[:, 0], to_kind[:, 0], from_kind[:, 1], to_kind[:, 1], to_kind[:, 7]]
    for (old_codec, codec, old_state, state, stochastic), at in _groups(kinds):
        some = fields[at].contiguous()
        jobs = build_jobs(some, some[:, 1], _widths(some[:, 2], old_codec, codec), _COPY_ELEMENTS,
                          target.arena.device)
        if jobs.tiles:
            _move_kernel[(jobs.tiles,)](
                source.arena, target.arena, jobs.table, source.places, target.places,
                target.places if rows is None else rows, *jobs.search, OLD=old_codec, CODEC=codec,
                OLD_STATE=old_state, STATE=state, STOCHASTIC=bool(stochastic),
                NUMBERED=rows is not None, R=jobs.R, C=jobs.C, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["num_jobs", "job_steps"])
def _move_kernel(old_arena, new_arena, table, old_places, new_places, row_ids, num_jobs, job_steps,
                 OLD: tl.constexpr, CODEC: tl.constexpr, OLD_STATE: tl.constexpr,
                 STATE: tl.constexpr, STOCHASTIC: tl.constexpr, NUMBERED: tl.constexpr,
                 R: tl.constexpr, C: tl.constexpr):
    """Job: (first tile, start, count, columns, offset and step of the source's rows and states, of
    the target's, key, first row, first column, element-wise states, states by row)."""
    number, row = find_tile(table, 17, num_jobs, job_steps, R)
    job = table + number * 17
    live = row < tl.load(job + 2)
    columns = tl.load(job + 3)
    at = tl.load(job + 1) + row
    old = tl.load(old_places + at, mask=live, other=0)
    new = tl.load(new_places + at, mask=live, other=0)
    if NUMBERED:
        low, high = row_words(tl.load(job + 12), tl.load(row_ids + at, mask=live, other=0))
    else:
        low, high = row_words(tl.load(job + 12), tl.load(job + 13) + new)
    first_column = tl.load(job + 14)
    c = tl.arange(0, C)[None, :]
    inside = live[:, None] & (c < columns)
    old_record = old_arena + tl.load(job + 4) + old * tl.load(job + 5)
    new_record = new_arena + tl.load(job + 8) + new * tl.load(job + 9)
    if OLD == CODEC:
        _copy_row(old_record, new_record, columns, c, live, CODEC)
    else:
        values = load_rows(old_record, columns, c, inside, OLD)
        store_rows(new_record, values, columns, c, inside, low, high, first_column, CODEC,
                   STOCHASTIC)
    old_state = old_arena + tl.load(job + 6) + old * tl.load(job + 7)
    new_state = new_arena + tl.load(job + 10) + new * tl.load(job + 11)
    parts = tl.load(job + 15)
    for part in range(0, parts):
        element = part * columns + c
        if OLD_STATE == STATE:
            _copy_plain(old_state[:, None], new_state[:, None], element, inside, STATE)
        else:
            values = load_plain(old_state[:, None], element, inside, OLD_STATE)
            counter = (first_column + c + (part + 1) * PART_SIZE).to(tl.uint32)
            random = random_bits(low[:, None], high[:, None], counter)
            store_plain(new_state[:, None], element, values, random, inside, STATE, STOCHASTIC)
    if tl.load(job + 16) > 0:
        element = parts * columns + 0 * row
        if OLD_STATE == STATE:
            _copy_plain(old_state, new_state, element, live, STATE)
        else:
            single = load_plain(old_state, element, live, OLD_STATE)
            counter = ((parts + 1) * PART_SIZE + 0 * row).to(tl.uint32)
            store_plain(new_state, element, single, random_bits(low, high, counter), live, STATE,
                        STOCHASTIC)


@triton.jit
def _copy_plain(old, new, element, mask, CODEC: tl.constexpr):
    """Copies elements of fp32, fp16 or bf16 records as they are."""
    if CODEC == FP32:
        bits = tl.load(old.to(tl.pointer_type(tl.int32)) + element, mask=mask)
        tl.store(new.to(tl.pointer_type(tl.int32)) + element, bits, mask=mask)
    else:
        codes = tl.load(old.to(tl.pointer_type(tl.int16)) + element, mask=mask)
        tl.store(new.to(tl.pointer_type(tl.int16)) + element, codes, mask=mask)


@triton.jit
def _copy_row(old, new, columns, c, live, CODEC: tl.constexpr):
    """Copies payloads as they are."""
    if CODEC <= BF16:
        _copy_plain(old[:, None], new[:, None], c, live[:, None] & (c < columns), CODEC)
    else:
        codes = columns
        if CODEC == INT4:
            codes = (columns + 1) // 2
        inside = live[:, None] & (c < codes)
        tl.store(new[:, None] + c, tl.load(old[:, None] + c, mask=inside), mask=inside)
        tl.store(new + codes, tl.load(old + codes, mask=live), mask=live)
