"""Sums of a unique id's entries in a fixed order, also where one id has most of the batch.

    sum[c] = sum over entries k of [starts[u], starts[u + 1]) of weights[k] * source[at[k] + c]

Adding the entries one behind the other costs a memory latency each: an id that occurs 60,000 times
would take tens of milliseconds. So every piece's entries are cut into chunks of CHUNK; a chunk that
lies whole inside one unique is summed by a program of its own first, and the unique adds the
entries before its first whole chunk, then the chunks' sums, then the rest. No atomics: the order
depends on the entries alone. Source: own.
"""


from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlab.ops.triton.tiles import Jobs, find_last
from shardlab.ops.unique import Uniques

#: Entries summed by one program: a hot id of n entries costs about CHUNK + n / CHUNK latencies,
#: which is least at the square root of n, and n is some 10,000.
CHUNK = 128

#: Fields of a piece's row in a job table, behind which an op may have more.
START, COUNT, COLUMNS, SHIFT = (tl.constexpr(i) for i in range(1, 5))


@dataclass(frozen=True)
class Chunks:
    """Sums of the whole chunks.

    Attributes:
        slots: int64 [K + 1] on the device: first chunk of every piece.
        sums: fp32 [chunks, width].
    """

    slots: Tensor
    sums: Tensor


def sum_chunks(source: Tensor, uniques: Uniques, weights: Tensor | None, pieces: Tensor,
               jobs: Jobs) -> Chunks | None:
    """Sums the whole chunks of all pieces in one launch; None where no unique can hold one.

    Args:
        source: fp32, flat.
        uniques: entries of every unique id.
        weights: fp32 [k], or None.
        pieces: int64 [K, 2+] on CPU: (start, count, ...) as in `sum_rows`.
        jobs: the same pieces on the device, fields in the order of START to SHIFT.
    """
    entries = uniques.sources.numel()
    bound = _most_overlaps(pieces) * entries // CHUNK
    if bound == 0 or entries - uniques.ids.numel() + 1 < CHUNK:
        return None
    start, count = jobs.table[:, START.value], jobs.table[:, COUNT.value]
    length = uniques.starts[start + count] - uniques.starts[start]
    slots = torch.nn.functional.pad((length // CHUNK).cumsum(0), (1, 0))
    width = max(4, jobs.C)
    sums = torch.empty(bound, width, dtype=torch.float32, device=source.device)
    grid = (triton.cdiv(bound, jobs.R),)
    _chunk_kernel[grid](source, uniques.starts, uniques.sources, source if weights is None
                        else weights, jobs.table, slots, sums, *jobs.search,
                        uniques.ids.numel().bit_length(), FIELDS=jobs.table.shape[1], WIDTH=width,
                        CHUNK=CHUNK, WEIGHTED=weights is not None, R=jobs.R, C=jobs.C,
                        enable_fp_fusion=False)
    return Chunks(slots, sums)


def _most_overlaps(pieces: Tensor) -> int:
    """How many pieces at most share one unique id: column shards of a table share all of them."""
    begins = pieces[:, 0].sort().values
    ends = (pieces[:, 0] + pieces[:, 1]).sort().values
    ended = torch.searchsorted(ends, begins, right=True)
    return max(1, int((torch.arange(1, len(begins) + 1) - ended).max()))


@triton.jit
def add_entries(total, begin, end, source, sources, weights, shift, columns_at, columns_inside,
                WEIGHTED: tl.constexpr):
    """total[r] += sum of weights[k] * source[sources[k] + shift[r] + c] over [begin[r], end[r]).

    total fp32 [R, C]; begin, end int64 [R]; shift int64 scalar or [R].
    """
    # Four rows of a tile in flight per thread hide the latency of one.
    for k in tl.range(0, tl.max(end - begin), loop_unroll_factor=4):
        at = begin + k
        inside = at < end
        row = tl.load(sources + at, mask=inside, other=0) + shift
        value = tl.load(source + row[:, None] + columns_at,
                        mask=inside[:, None] & columns_inside, other=0.0)
        if WEIGHTED:
            value = value * tl.load(weights + at, mask=inside, other=0.0)[:, None]
        total += value
    return total


@triton.jit
def sum_entries(source, starts, sources, weights, slots, sums, piece, number, unique, live,
                columns_at, columns_inside, CHUNKED: tl.constexpr, WIDTH: tl.constexpr,
                CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Sums of the entries of uniques int64 [R], fp32 [R, C]; zeros where not live.

    ``piece`` points to the fields of the uniques' piece, ``number`` is its number.
    """
    shift = tl.load(piece + SHIFT)
    begin = tl.load(starts + unique, mask=live, other=0)
    end = tl.load(starts + unique + 1, mask=live, other=0)
    total = tl.zeros([R, C], dtype=tl.float32)
    if not CHUNKED:
        return add_entries(total, begin, end, source, sources, weights, shift, columns_at,
                           columns_inside, WEIGHTED)
    origin = tl.load(starts + tl.load(piece + START))
    first = (begin - origin + (CHUNK - 1)) // CHUNK
    last = (end - origin) // CHUNK
    whole = live & (last > first)
    head_end = tl.where(whole, origin + first * CHUNK, end)
    total = add_entries(total, begin, head_end, source, sources, weights, shift, columns_at,
                        columns_inside, WEIGHTED)
    slot = tl.load(slots + number) + first
    for k in tl.range(0, tl.max(tl.where(whole, last - first, 0)), loop_unroll_factor=4):
        inside = whole & (first + k < last)
        total += tl.load(sums + (slot + k)[:, None] * WIDTH + columns_at,
                         mask=inside[:, None] & columns_inside, other=0.0)
    tail = tl.where(whole, origin + last * CHUNK, end)
    return add_entries(total, tail, end, source, sources, weights, shift, columns_at,
                       columns_inside, WEIGHTED)


@triton.jit(do_not_specialize=["num_pieces", "piece_steps", "unique_steps"])
def _chunk_kernel(source, starts, sources, weights, pieces, slots, sums, num_pieces, piece_steps,
                  unique_steps, FIELDS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
                  WEIGHTED: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """sums[slot] = sum of the chunk's entries, for chunks that lie whole inside one unique."""
    slot = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = slot < tl.load(slots + num_pieces)
    number = find_last(slots, 1, num_pieces, tl.where(live, slot, 0), piece_steps)
    piece = pieces + number * FIELDS
    first = tl.load(piece + START)
    begin = tl.load(starts + first) + (slot - tl.load(slots + number)) * CHUNK
    begin = tl.where(live, begin, 0)
    unique = first + find_last(starts + first, 1, tl.load(piece + COUNT), begin, unique_steps)
    whole = live & (tl.load(starts + unique + 1, mask=live, other=0) >= begin + CHUNK)
    columns_at = tl.arange(0, C)[None, :]
    columns = tl.load(piece + COLUMNS)
    inside = columns_at < columns[:, None]
    shift = tl.load(piece + SHIFT)
    total = add_entries(tl.zeros([R, C], dtype=tl.float32), begin,
                        tl.where(whole, begin + CHUNK, begin), source, sources, weights, shift,
                        columns_at, inside, WEIGHTED)
    tl.store(sums + slot[:, None] * WIDTH + columns_at, total, mask=whole[:, None] & inside)
