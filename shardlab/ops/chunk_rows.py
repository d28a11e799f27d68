"""Rows whose chunks lie in a pool: read as whole rows, stepped chunk by chunk.

A pool is a block of an arena whose rows are chunks; every shard has a `Blocks` entry of its own
that points at its store's pool. The native face finds, reads and steps in one pass. The other faces
look places up on the host, and read and step them with the ops of whole rows (`pool_blocks`,
`sum_rows`, `update_rows`: plain torch, or Triton on CUDA).

Source: arXiv 2401.04408; exact fused optimisers as in arXiv 2104.05158.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.chunk_index import ChunkIndex, Offers
from shardlab.ops.chunk_initial import InitialChunks
from shardlab.ops.chunk_numbers import counting_rows
from shardlab.ops.chunks import NativeChunkIndex
from shardlab.ops.registry import address, face_of, native
from shardlab.ops.rows import job_spans, pool_blocks, sum_rows, update_rows
from shardlab.ops.step_parameters import RULES, StepParameters
from shardlab.ops.unique import Uniques

_LANES = 16
_MOST_NORM = 1e30


@dataclass(frozen=True)
class ChunkPools:
    """Where the chunks of a rank's shards lie.

    Attributes:
        index: which chunks are present, and where.
        arena: uint8.
        blocks: of every shard: its store's pool, columns those of a chunk; with encodings.
        initial: what admitted chunks start from, or None: all from zeros.
    """

    index: ChunkIndex
    arena: Tensor
    blocks: Blocks
    initial: InitialChunks | None = None

    @cached_property
    def chunk_counts(self) -> frozenset[int]:
        """Chunks of a row, of every store."""
        return frozenset(shape.layout.chunks for shape in self.index.shapes)

    @property
    def most_chunks(self) -> int:
        """Chunks of the rows that have most; 1 without shards."""
        return max(self.chunk_counts, default=1)

    def chunks(self, block: int) -> int:
        """Chunks of a row of a shard."""
        return self.index.shapes[int(self.index.blocks[block, 0])].layout.chunks

    def width(self, block: int) -> int:
        """Columns of a chunk of a shard."""
        return int(self.blocks.table[block, 4])

    def shared(self, block: int) -> int:
        """Place of what a shard's first chunk reads as where it is absent; -1 for zeros."""
        return int(self.index.blocks[block, 5])

    def is_native(self, op: str) -> bool:
        """Whether the native face runs an op."""
        return face_of(op, self.arena.device.type) == "native" \
            and isinstance(self.index, NativeChunkIndex)

    def native_arena(self) -> tuple[int, int, int, int]:
        """What native kernels take."""
        return (address(self.arena), address(self.blocks.table), address(self.blocks.encodings),
                self.blocks.table.shape[0])


# ---------------------------------------------------------------- read
def read_chunks(pools: ChunkPools, segments: Tensor, ids: Tensor, out: Tensor) -> None:
    """Copies rows densely into ``out``. Arguments as `gather_rows`."""
    if pools.is_native("read_chunks"):
        assert isinstance(pools.index, NativeChunkIndex)
        native().chunk_read(pools.index.call(), pools.native_arena(),  # type: ignore[union-attr]
                            address(segments), *segments.shape, address(ids), [], address(out),
                            torch.get_num_threads())
        return
    jobs = torch.zeros(segments.shape[0], 11, dtype=torch.int64)
    jobs[:, 0], jobs[:, 3], jobs[:, 4] = segments[:, 0], segments[:, 2], segments[:, 1]
    jobs[:, 6], jobs[:, 8] = 1, segments[:, 3]
    for job in jobs:
        job[9] = pools.chunks(int(job[0])) * pools.width(int(job[0]))
    pool_chunks(pools, jobs, ids, None, None, out)


def pool_chunks(pools: ChunkPools, jobs: Tensor, ids: Tensor, offsets: Tensor | None,
                weights: Tensor | None, out: Tensor) -> None:
    """Pools bags straight from the chunks, one chunk column after the other.

    Args:
        pools: where chunks lie.
        jobs: int64 [J, 11] on CPU, as `ops.rows.pool_rows` takes them, with the block's number in
            the first column.
        ids: int64 [n], rows of the jobs' blocks.
        offsets, weights, out: as in `ops.rows.pool_rows`.
    """
    segments = torch.tensor(job_spans(jobs, offsets), dtype=torch.int64).view(-1, 3)
    places = _read_places(pools, segments, ids.cpu())
    table, encodings = pools.blocks.table, pools.blocks.encodings
    assert encodings is not None
    counts = torch.tensor([pools.chunks(block) for block in range(table.shape[0])],
                          dtype=torch.int64)
    for k in range(int(counts.max()) if counts.numel() else 0):
        some = jobs[counts[jobs[:, 0]] > k]
        block = some[:, 0]
        kernel = torch.cat([some, encodings[block, :1]], 1)
        kernel[:, 0], kernel[:, 1], kernel[:, 2] = table[block, 0], table[block, 1], table[block, 4]
        kernel[:, 8] += k * table[block, 4]
        pool_blocks(pools.arena, kernel, places[k].to(pools.arena.device), offsets, weights, out)


def _read_places(pools: ChunkPools, segments: Tensor, ids: Tensor) -> Tensor:
    """`ChunkIndex.places`, and where absent chunks are shared, the places of these."""
    places = pools.index.places(segments, ids)
    for block, start, count in segments.tolist():
        if pools.shared(block) >= 0:
            chunks = pools.chunks(block)
            part = places[:chunks, start:start + count]
            shared = pools.shared(block) + torch.arange(chunks)
            part.copy_(torch.where(part < 0, shared[:, None], part))
    return places


def scatter_chunks(pools: ChunkPools, uniques: Uniques, segments: Tensor,
                   weights: Tensor | None, out: Tensor) -> Tensor | None:
    """Copies every row to its entries' places.

    Args:
        pools: where chunks lie.
        segments: `block_segments` of the uniques.
        uniques, weights, out: as in `ops.scatter.scatter_rows`.

    Returns:
        int64 [m]: the uniques' slots, for `UtilityStep.slots`; None where nobody has them.
    """
    if pools.is_native("read_chunks"):
        assert isinstance(pools.index, NativeChunkIndex)
        slots = torch.empty(uniques.ids.numel(), dtype=torch.int64)
        entries = [address(uniques.starts), address(uniques.sources), address(weights),
                   address(slots)]
        native().chunk_read(pools.index.call(), pools.native_arena(),  # type: ignore[union-attr]
                            address(segments), *segments.shape, address(uniques.ids), entries,
                            address(out), torch.get_num_threads())
        return slots
    for block, start, count in segments.tolist():
        columns = pools.chunks(block) * pools.width(block)
        rows = torch.empty(count, columns, device=out.device)
        read_chunks(pools, torch.tensor([[block, start, count, 0]]), uniques.ids, rows.view(-1))
        first, last = int(uniques.starts[start]), int(uniques.starts[start + count])
        each = torch.repeat_interleave(rows, uniques.starts[start:start + count + 1].diff(), 0)
        if weights is not None:
            each = each * weights[first:last, None]
        at = uniques.sources[first:last, None] + torch.arange(columns, device=out.device)
        out[at] = each
    return None


def block_segments(uniques: Uniques) -> Tensor:
    """int64 [K, 3] on CPU: (block, start, count) of the blocks that have uniques."""
    splits = uniques.splits.tolist()
    found = [(block, start, end - start)
             for block, (start, end) in enumerate(pairwise(splits))
             if end > start]
    return torch.tensor(found, dtype=torch.int64).view(-1, 3)


# ---------------------------------------------------------------- update
@dataclass(frozen=True)
class UtilityStep:
    """How a step counts towards utilities.

    Attributes:
        weights: fp32 [blocks] on CPU: of this step; utilities are as of the last decision.
        key: of the random bits of rounding them.
        shares: fp32 [blocks] on CPU: of the rows whose absent chunks count, drawn by chance; these
            count for the others. 1: all.
        absent: fp32 [blocks, most columns + chunks] where the gradients are, or None: to what
            shards whose absent chunks are shared hold here their scaled gradients are added, by
            column, and, behind the columns, how many there are of every chunk.
        slots: int64 [m], or None: slots of the uniques, as `scatter_chunks` found them in an index
            that has not changed since.
    """

    weights: Tensor
    key: int
    shares: Tensor
    absent: Tensor | None = None
    slots: Tensor | None = None


def update_chunks(pools: ChunkPools, uniques: Uniques, weights: Tensor | None, grads: Tensor,
                  step: StepParameters, row_squares: Tensor | None,
                  utility: UtilityStep) -> Tensor:
    """One optimiser step on every present chunk of every unique row, and its utility.

    Args:
        pools: where chunks lie; stepped in place.
        uniques, weights, grads, step, row_squares: as in `ops.rows.update_rows`. A row-wise state
            is kept per chunk and fed with the mean square of the whole row.
        utility: how the step counts.

    Returns:
        fp32 [m, most chunks] on CPU: gradient norm times accesses of absent chunks, over their
        share, 0 where the row does not count; -1 elsewhere.
    """
    stride = pools.most_chunks
    norms = torch.empty(uniques.ids.numel(), stride)
    if len(pools.chunk_counts) > 1:
        norms.fill_(-1.0)
    if pools.is_native("update_chunks"):
        assert isinstance(pools.index, NativeChunkIndex)
        native().chunk_update(  # type: ignore[union-attr]
            pools.index.call(), pools.native_arena(), _addresses(uniques, weights, grads,
                                                                 row_squares),
            step.key, RULES[step.kind], step.numbers(),
            (address(utility.weights), utility.key, address(norms), stride,
             address(utility.absent), 0 if utility.absent is None else utility.absent.shape[1],
             address(utility.slots), address(utility.shares)),
            torch.get_num_threads())
        return norms
    ids, segments = uniques.ids.cpu(), block_segments(uniques)
    places = pools.index.places(segments, ids)
    accesses = uniques.starts.diff().float().cpu()
    for block, start, count in segments.tolist():
        chunks, part = pools.chunks(block), slice(start, start + count)
        summed = summed_gradients(pools, block, (uniques, weights, grads, replace(
            step, clip_value=0.0)), torch.arange(start, start + count))
        if utility.absent is not None and pools.shared(block) >= 0:
            _add_absent(summed, places[:chunks, part].T < 0, utility.absent[block])
        if step.clip_value > 0:
            summed.clamp_(-step.clip_value, step.clip_value)
        squares = chunk_squares(summed, chunks)
        norms[part, :chunks] = (_root(squares).cpu() * accesses[part, None]).clamp(max=_MOST_NORM)
        _step_present(pools, block, places[:chunks, part].T, (summed, ids[part]), step,
                      None if row_squares is None else row_squares[part])
    none = torch.zeros_like(utility.weights)
    pools.index.touch(Offers(segments, ids, norms, utility.weights, none, utility.key, none,
                             torch.zeros(none.numel(), dtype=torch.int64)))
    for block, start, count in segments.tolist():
        part, share = slice(start, start + count), utility.shares[block]
        counts = counting_rows(pools.index.blocks[block], utility.key, ids[part], share)
        norms[part, :pools.chunks(block)] *= torch.where(counts, 1.0 / share, 0.0)[:, None]
    norms[places.T[:, :stride] >= 0] = -1.0
    return norms


def _add_absent(summed: Tensor, absent: Tensor, sums: Tensor) -> None:
    """Adds what rows [n, columns] give to ``absent`` chunks, bool [n, chunks], and counts."""
    absent = absent.to(summed.device)
    (count, columns), chunks = summed.shape, absent.shape[1]
    parts = torch.where(absent[:, :, None], summed.view(count, chunks, -1), 0.0)
    sums[:columns] += parts.sum(0).flatten()
    sums[columns:columns + chunks] += absent.sum(0)


def _addresses(uniques: Uniques, weights: Tensor | None, grads: Tensor,
               row_squares: Tensor | None) -> list[int]:
    """What native kernels take of an update."""
    return [address(tensor) for tensor in (uniques.ids, uniques.splits, uniques.starts,
                                           uniques.sources, weights, grads, row_squares)]


def step_admitted(pools: ChunkPools, admitted: Tensor, uniques: Uniques, weights: Tensor | None,
                  grads: Tensor, step: StepParameters, row_squares: Tensor | None) -> None:
    """The first step of chunks that were admitted now: writes what they start from, clears states.

    Args:
        pools: where chunks lie.
        admitted: int64 [a, 3] on CPU, as `ChunkIndex.offer` gives them.
        uniques, weights, grads, step, row_squares: of `update_chunks`.
    """
    if not admitted.shape[0]:
        return
    initial = pools.initial
    if initial is not None:
        initial.write(pools.arena, pools.blocks, pools.index.blocks, admitted,
                      (uniques.ids.cpu(), uniques.splits))
    if pools.is_native("step_admitted"):
        assert isinstance(pools.index, NativeChunkIndex)
        native().chunk_admit(  # type: ignore[union-attr]
            pools.index.call(), pools.native_arena(), _addresses(uniques, weights, grads,
                                                                 row_squares),
            step.key, RULES[step.kind], step.numbers(), address(admitted), admitted.shape[0],
            address(None if initial is None else initial.starts), torch.get_num_threads())
        return
    rows, inverse = torch.unique_consecutive(admitted[:, 0], return_inverse=True)
    places = torch.full((rows.numel(), pools.most_chunks), -1, dtype=torch.int64)
    places[inverse, admitted[:, 1]] = admitted[:, 2]
    edges = torch.searchsorted(rows, uniques.splits)
    ids = uniques.ids.cpu()
    for block, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(),
                                             strict=True)):
        if start == end:
            continue
        some = rows[start:end]
        _clear(pools, block, places[start:end][places[start:end] >= 0],
               weights=initial is None or not initial.starts[block])
        summed = summed_gradients(pools, block, (uniques, weights, grads, step), some)
        squares = None if row_squares is None else row_squares[some.to(row_squares.device)]
        _step_present(pools, block, places[start:end, :pools.chunks(block)], (summed, ids[some]),
                      step, squares)


def summed_gradients(pools: ChunkPools, block: int,
            what: tuple[Uniques, Tensor | None, Tensor, StepParameters], some: Tensor) -> Tensor:
    """Summed, scaled, clipped gradients of the uniques ``some`` (ascending), [n, columns]."""
    uniques, weights, grads, step = what
    columns = pools.chunks(block) * pools.width(block)
    out = torch.empty(some.numel(), columns, device=grads.device)
    chosen = _chosen(uniques, weights, some.to(uniques.ids.device))
    piece = torch.tensor([[0, some.numel(), columns, 0, 0, columns]])
    sum_rows(grads, chosen[0], chosen[1], piece, step.scale, out.view(-1))
    return out.clamp_(-step.clip_value, step.clip_value) if step.clip_value > 0 else out


def _chosen(uniques: Uniques, weights: Tensor | None,
            some: Tensor) -> tuple[Uniques, Tensor | None]:
    """Some uniques with their entries, and the entries' weights."""
    counts = uniques.starts.diff()[some]
    starts = torch.zeros(some.numel() + 1, dtype=torch.int64, device=some.device)
    torch.cumsum(counts, 0, out=starts[1:])
    entries = torch.repeat_interleave(uniques.starts[some] - starts[:-1], counts) \
        + torch.arange(int(starts[-1]), device=some.device)
    chosen = Uniques(uniques.ids[some], torch.tensor([0, some.numel()]), starts,
                     uniques.sources[entries])
    return chosen, None if weights is None else weights[entries]


def _step_present(pools: ChunkPools, block: int, places: Tensor, rows: tuple[Tensor, Tensor],
                  step: StepParameters, row_squares: Tensor | None) -> None:
    """Steps the chunks at ``places`` [n, chunks] of rows (summed gradients, ids)."""
    summed, ids = rows
    width, columns = pools.width(block), summed.shape[1]
    row, chunk = (places >= 0).nonzero(as_tuple=True)
    if not row.numel():
        return
    device = summed.device
    mean = _reduced(summed) / columns
    if row_squares is not None:
        mean = torch.where(row_squares < 0, mean, row_squares)
    _, row_start, first, table_chunks, *_ = pools.index.blocks[block].tolist()
    count = row.numel()
    splits = torch.zeros(pools.blocks.table.shape[0] + 1, dtype=torch.int64)
    splits[block + 1:] = count
    uniques = Uniques(places[row, chunk].to(device), splits,
                      torch.arange(count + 1, device=device),
                      (row * columns + chunk * width).to(device))
    numbers = (ids[row] + row_start) * table_chunks + first + chunk
    parameters = replace(step, scale=1.0, clip_value=0.0, rows=numbers.to(device))
    update_rows(pools.arena, pools.blocks, uniques, None, summed.view(-1), parameters,
                mean[row.to(device)])


# ---------------------------------------------------------------- sums of squares
def chunk_squares(grads: Tensor, chunks: int) -> Tensor:
    """Sums of squares of every chunk, in the kernels' order: fp32 [n, chunks] of [n, columns]."""
    return _reduced(grads.reshape(-1, grads.shape[1] // chunks)).view(-1, chunks)


def _reduced(values: Tensor) -> Tensor:
    """fp32 [n]: sum of squares over [n, c], sixteen lanes at a time, then halves onto halves."""
    missing = -values.shape[1] % _LANES
    padded = torch.nn.functional.pad(values, (0, missing)).view(values.shape[0], -1, _LANES)
    lanes = torch.zeros(values.shape[0], _LANES, device=values.device)
    for part in padded.unbind(1):
        lanes = lanes + part * part
    half = lanes[:, :8] + lanes[:, 8:]
    quarter = half[:, :4] + half[:, 4:]
    return (quarter[:, 0] + quarter[:, 2]) + (quarter[:, 1] + quarter[:, 3])


def _root(x: Tensor) -> Tensor:
    """Square root to the nearest fp32."""
    return x.double().sqrt().float()


def _clear(pools: ChunkPools, block: int, places: Tensor, *, weights: bool) -> None:
    """Writes zeros to the states of chunks, and to their weights."""
    at = places.to(pools.arena.device)
    if weights:
        pools.blocks.payloads(pools.arena, block)[at] = 0
    states = pools.blocks.states(pools.arena, block)
    if states.shape[1]:
        states[at] = 0


def move_places(pools: ChunkPools, block: int, moves: Tensor) -> None:
    """Copies chunks and their states from moves[:, 0] to moves[:, 1], where the index does not
    reach the pool."""
    source, target = moves.to(pools.arena.device).unbind(1)
    for part in (pools.blocks.payloads(pools.arena, block), pools.blocks.states(pools.arena,
                                                                                block)):
        if part.shape[1]:
            part[target] = part[source]
