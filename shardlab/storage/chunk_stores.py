"""Which shards share a store of chunks, what it may hold, and where its pool lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from shardlab.chunk_layout import in_pages, slab_chunks
from shardlab.codecs import table_key
from shardlab.errors import ConfigError
from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.chunk_index import StoreShape
from shardlab.ops.chunk_initial import InitialChunks
from shardlab.ops.chunk_rows import ChunkPools
from shardlab.ops.chunks import build_chunk_index, index_span_bytes, index_used_spans
from shardlab.ops.init import InitStreams
from shardlab.specs import UNBOUNDED
from shardlab.storage.base import LocalShard, StorageOptions
from shardlab.storage_bytes import OPTIMIZER_STATE, chunk_layout
from shardlab.storage_specs import PrunedSpec, Tier
from shardlab.tiers import allocate

#: Places are int32.
_MOST_CHUNKS = (1 << 31) - 1
#: Stores from this size on lie in huge pages, but for the last part of what they will hold: a full
#: store then takes no more memory than it holds, and one that fills at most a page more.
_HUGE_STORE_BYTES = 16 << 20
_HUGE_PART = 15 / 16
#: What a store without a budget may hold.
NO_BUDGET = 1 << 62


@dataclass(frozen=True)
class StorePlan:
    """One store.

    Attributes:
        spec: of its shards; their budgets and ratios differ.
        blocks: numbers of its shards.
        shape: what it is built for.
        target: bytes that its shards may hold together; `NO_BUDGET` where nothing is pruned.
        full_bytes: bytes with every chunk present.
    """

    spec: PrunedSpec
    blocks: tuple[int, ...]
    shape: StoreShape
    target: int
    full_bytes: int

    @property
    def lasting_chunks(self) -> int:
        """Chunks that it will hold for certain once it is full; 0 for a small store."""
        target = min(self.target, self.full_bytes)
        if target < _HUGE_STORE_BYTES:
            return 0
        if self.spec.is_full:
            return self.shape.max_chunks
        likely = self.shape.layout.likely_chunks(target, self.spec.sketch)
        return min(int(_HUGE_PART * likely), self.shape.max_chunks)


def pruned_spec(local: LocalShard) -> PrunedSpec:
    """The storage of a shard that is pruned."""
    assert isinstance(local.storage, PrunedSpec)
    return local.storage


def shard_budget(local: LocalShard) -> int:
    """Bytes that a shard may hold: its share of the table's."""
    spec, shard, table = pruned_spec(local), local.shard, local.table
    if spec.bytes is None:
        return spec.budget(shard.rows, shard.columns)
    return spec.bytes * shard.rows * shard.columns // (table.num_embeddings * table.embedding_dim)


def plan_stores(shards: Sequence[LocalShard], optimizer: str) -> list[StorePlan]:
    """Groups shards whose chunks are alike and whose budgets are shared.

    Raises:
        ConfigError: a replicated table; a cut through a chunk; more chunks than a pool can number.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for block, local in enumerate(shards):
        _check(local)
        spec = pruned_spec(local)
        alone = block if local.table.num_embeddings == UNBOUNDED else None
        key = (spec.schedule, spec.width, local.shard.columns, spec.dtype, spec.tier, spec.sketch,
               spec.absent, spec.admitted, alone)
        groups.setdefault(key, []).append(block)
    shared: dict[tuple[object, ...], int] = {}
    for local in shards:
        spec = pruned_spec(local)
        shared[spec.schedule] = shared.get(spec.schedule, 0) + shard_budget(local)
    return [_plan(shards, blocks, shared, optimizer) for blocks in groups.values()]


def _check(local: LocalShard) -> None:
    spec, shard, where = pruned_spec(local), local.shard, f"table {local.table.name!r}"
    if local.replicated:
        raise ConfigError(f"{where}: a pruned table cannot be data_parallel: every rank would need "
                          "all chunks and the same decisions; take table_wise, row_wise or "
                          "column_wise, or storage fp32")
    if shard.col_start % spec.width or shard.columns % spec.width:
        raise ConfigError(f"{where}: columns [{shard.col_start}, {shard.col_end}) cut a chunk of "
                          f"{spec.width} columns in two; cut the table at multiples of it")


def _check_tiers(shards: Sequence[LocalShard], device: torch.device) -> None:
    """Kernels step chunks where their gradients are."""
    for local in shards:
        if pruned_spec(local).tier is Tier.DDR and device.type != "cpu":
            raise ConfigError(f"table {local.table.name!r}: pruned with tier: ddr on {device}: its "
                              "chunks must lie on the device that trains them; take tier: hbm, or "
                              "a storage of rows with a cache above ddr")


def _plan(shards: Sequence[LocalShard], blocks: list[int], shared: dict[tuple[object, ...], int],
          optimizer: str) -> StorePlan:
    spec, first = pruned_spec(shards[blocks[0]]), shards[blocks[0]]
    rows = sum(shards[block].shard.rows for block in blocks)
    target = sum(shard_budget(shards[block]) for block in blocks)
    columns = first.shard.columns
    layout = chunk_layout(spec, rows, columns, optimizer, 0 if spec.is_full else target)
    layout = replace(layout, shared=layout.shared * len(blocks))
    full = layout.full_bytes(rows)
    if spec.is_full or target >= full:
        target = NO_BUDGET
    most = layout.shared + rows * layout.chunks
    if spec.start == "empty" and not spec.is_full:
        room = int(shared[spec.schedule] * (1 + spec.slack)) // layout.record_bytes
        most = min(most, layout.shared + room
                   + slab_chunks(min(target, full), layout.record_bytes))
    if most > _MOST_CHUNKS:
        raise ConfigError(f"table {first.table.name!r}: {most} chunks on one rank; a pool numbers "
                          f"{_MOST_CHUNKS}. Use more ranks, fewer chunks, or start: empty with a "
                          "smaller budget")
    shape = StoreShape(layout, slab_chunks(min(target, full), layout.record_bytes), most,
                       min(rows, most), wide=first.table.num_embeddings == UNBOUNDED)
    return StorePlan(spec, tuple(blocks), shape, target, full)


def _rows_before(shards: Sequence[LocalShard]) -> torch.Tensor:
    """int64 [n]: rows of the shards before each."""
    rows = [local.shard.rows for local in shards]
    return torch.tensor([0, *accumulate(rows[:-1])])


def build_pools(shards: Sequence[LocalShard], plans: Sequence[StorePlan],
                options: StorageOptions) -> ChunkPools:
    """An empty index and the pools of all stores, in one arena."""
    table = torch.zeros(len(shards), 6, dtype=torch.int64)
    blocks = torch.zeros(len(shards), 7, dtype=torch.int64)
    encodings: list[Encoding] = [Encoding()] * len(shards)
    used: list[tuple[int, int]] = []
    offset, pools = 0, []
    per_column, per_row = OPTIMIZER_STATE[options.optimizer]
    for number, plan in enumerate(plans):
        layout, most = plan.shape.layout, plan.shape.max_chunks
        state = offset + in_pages(most * layout.payload_bytes)
        end = state + in_pages(most * layout.state_bytes)
        used += [(offset, offset + plan.lasting_chunks * layout.payload_bytes),
                 (state, state + plan.lasting_chunks * layout.state_bytes)]
        for place, block in enumerate(plan.blocks):
            local = shards[block]
            width = plan.spec.width
            table[block] = torch.tensor([offset, layout.payload_bytes, state, layout.state_bytes,
                                         width, most])
            key = table_key(local.table.name)
            blocks[block] = torch.tensor([
                number, local.shard.row_start, local.shard.col_start // width,
                local.table.embedding_dim // width, key,
                place * layout.chunks if layout.shared else -1, 0])
            encodings[block] = Encoding(plan.spec.dtype, "fp32", per_column, per_row,
                                        table_key=key)
        pools.append((offset, state))
        blocks[list(plan.blocks), 6] = _rows_before([shards[block] for block in plan.blocks])
        offset = end
    device = options.device
    _check_tiers(shards, device)
    arena = allocate(offset, device, used)
    reached = device.type == "cpu"
    addresses = [(arena.data_ptr() + payload, arena.data_ptr() + state) if reached else (0, 0)
                 for payload, state in pools]
    shapes = [plan.shape for plan in plans]
    memory = allocate(index_span_bytes(shapes), torch.device("cpu"),
                      index_used_spans(shapes, [plan.lasting_chunks for plan in plans]))
    index = build_chunk_index(shapes, blocks, memory, addresses)
    for number, plan in enumerate(plans):
        dense = plan.spec.is_full or plan.spec.start == "dense"
        index.set_budget(number, NO_BUDGET if dense else plan.target)
    return ChunkPools(index, arena, Blocks.build(table, encodings),
                      _initial(shards, plans, options.seed))


def _initial(shards: Sequence[LocalShard], plans: Sequence[StorePlan],
             seed: int) -> InitialChunks | None:
    """What admitted chunks start from; None: all from zeros."""
    starts = torch.zeros(len(shards), dtype=torch.bool)
    for plan in plans:
        starts[list(plan.blocks)] = plan.spec.admitted == "initial"
    if not starts.any():
        return None
    return InitialChunks(starts, InitStreams.of([local.table for local in shards], seed), seed)
