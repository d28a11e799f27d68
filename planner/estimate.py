"""Bytes and milliseconds of every piece of every option.

The step is "ids out, rows back" (see `PHASES`). With W ranks and, per table: F features, B bags
and n ids of one feature on one rank, u different ids among them, g different ids of all features
and ranks; and, per piece: a share s of the table's rows, d of its D columns. A rank is charged
what it does and receives as *owner* of a piece; every rank also pays, as *source*, what its own
samples cost. Bytes between a piece's owner and one source:

    phase       unique rows      pooled bags             data_parallel
    ids         8 F (u s + 1)    8 F (n s + B)           8 F u
    rows        4 F u s d        4 F B d                 0
    gradients   4 F u s d        4 F B d                 4 F u D     to every other rank

(+ 1: each shard's count of ids). Times, with row(b) = 1 / rows_per_s + b / row_bytes_per_s for a
random row of b bytes, stream(b) = b / stream_bytes_per_s, x = u s or n s + B:

    wire        bytes x max((ranks_per_host - 1) / intra, (W - ranks_per_host) / inter)
    read        s g row(4 d) + stream(4 d W F x)      gather once, copy or pool for every source
    update      1.1 s g row(record) + stream(4 d W F x)    merge gradients, one fused update
    pool        rows: stream(8 F D (n + B + u)); pooled: stream(8 F D B (k - 1)), k row blocks
    de-duplication, in ids: rows and data_parallel: F n row(8); pooled: stream(16 F n)

Every exchange also takes a message to each other rank; ids need two (counts first). Not in the
model yet: ids more frequent in one row block than in another, overlap of phases, the dense
model's time, storage below HBM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.enumerate import Options
from shardlab.planner.topology import Topology
from shardlab.planner.workload import Workload
from shardlab.specs import EmbeddingBagConfig, ShardingType, Tier, tier_bytes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Phases of a step, in order: de-duplicate and send ids; owners read rows; rows travel; sources
#: expand and pool (and undo that for gradients); gradients travel; owners update.
PHASES = ("ids", "read", "rows", "pool", "gradients", "update")
_IDS, _READ, _ROWS, _POOL, _GRADIENTS, _UPDATE = range(len(PHASES))

_ID_BYTES = 8
_ELEMENT_BYTES = 4
# Read-modify-write of random rows was measured within 10 % of reading them.
_REWRITE = 1.1
_MS = 1e3


@dataclass(frozen=True)
class Costs:
    """What each piece costs its owner, and each option every rank.

    Attributes:
        phase_ms: [P, 6] a piece's milliseconds on its owner, by phase.
        table_bytes: [P] rows and optimiser state, by `shardlab.specs.tier_bytes`.
        buffer_bytes: [P] ids, rows and gradients that the owner holds for all sources.
        common_phase_ms: [O, 6] milliseconds on every rank as a source.
        common_bytes: [O] buffers on every rank as a source.
        fixed_phase_ms: [6] milliseconds of a step whatever the plan: message latency.
        ms: [P] sum over phases.
        bytes: [P] table and buffers.
        common_ms: [O] sum over phases.
        fixed_ms: sum over phases.
    """

    phase_ms: Floats
    table_bytes: Ints
    buffer_bytes: Ints
    common_phase_ms: Floats
    common_bytes: Ints
    fixed_phase_ms: Floats

    def __post_init__(self) -> None:
        for name, value in (("ms", self.phase_ms.sum(axis=1)),
                            ("bytes", self.table_bytes + self.buffer_bytes),
                            ("common_ms", self.common_phase_ms.sum(axis=1)),
                            ("fixed_ms", float(self.fixed_phase_ms.sum()))):
            object.__setattr__(self, name, value)

    ms: Floats = None  # type: ignore[assignment]
    bytes: Ints = None  # type: ignore[assignment]
    common_ms: Floats = None  # type: ignore[assignment]
    fixed_ms: float = 0.0


@lru_cache(maxsize=None)
def _record_bytes(storage: object, columns: int, optimizer: str) -> int:
    """Bytes of one row of a shard: `tier_bytes` of a ``rows`` storage is linear in rows."""
    return tier_bytes(storage, Tier.HBM, 1, columns, optimizer).total  # type: ignore[arg-type]


class Speeds:
    """Milliseconds of the elementary acts on one rank of a topology."""

    def __init__(self, topology: Topology) -> None:
        memory = topology.memory
        near = topology.ranks_per_host - 1
        far = topology.world_size - topology.ranks_per_host
        intra, inter = topology.intra_host, topology.inter_host
        self.peers = near + far
        self.access = _MS / memory.rows_per_s
        self.row_byte = _MS / memory.row_bytes_per_s
        self.stream_byte = _MS / memory.stream_bytes_per_s
        # Links within and between hosts run side by side.
        self.wire_byte = _MS * max(near / intra.bytes_per_s, far / inter.bytes_per_s)
        self.message = _MS * (near * intra.latency_s + far * inter.latency_s)
        self.shard = _MS * topology.shard_overhead_s

    def row(self, size: Floats | float) -> Floats:
        """A random access to a row of ``size`` bytes."""
        return np.asarray(self.access + self.row_byte * size)


@dataclass(frozen=True)
class _View:
    """The workload as seen by pieces or by options: every array indexed alike."""

    features: Floats
    bags: Floats
    ids: Floats
    unique: Floats
    step_unique: Floats
    columns: Floats

    @staticmethod
    def of(work: Workload, table: Ints) -> _View:
        return _View(work.features[table], work.bags[table], work.ids[table],
                     work.unique[table], work.step_unique[table], work.columns[table])


def estimate(tables: Sequence[EmbeddingBagConfig], options: Options, work: Workload,
             topology: Topology, optimizer: str) -> Costs:
    """Prices every piece and option; the formulas are this module's docstring.

    Args:
        tables: the tables, in the order of ``options`` and ``work``.
        options: O options of P pieces.
        work: expected work of one step.
        topology: the machine.
        optimizer: a name of `shardlab.specs.OPTIMIZER_STATE`.
    """
    speeds = Speeds(topology)
    copied = np.array([cut.sharding is ShardingType.DATA_PARALLEL for cut in options.cuts])
    record = np.array([_record_bytes(tables[table].storage, int(columns), optimizer)
                       for table, columns in _distinct(options)])[_distinct_index(options)]
    phase_ms, buffers = _owner(options, work, speeds, record, copied)
    common_ms, common_bytes = _source(options, work, speeds, copied)
    fixed = np.zeros(len(PHASES))
    fixed[[_IDS, _ROWS, _GRADIENTS]] = speeds.message * np.array([2, 1, 1])
    return Costs(phase_ms, options.rows * record, buffers, common_ms, common_bytes, fixed)


def _keys(options: Options) -> Ints:
    table = options.table[options.option]
    return table * (int(options.columns.max()) + 1) + options.columns


def _distinct(options: Options) -> list[tuple[int, int]]:
    keys, base = np.unique(_keys(options)), int(options.columns.max()) + 1
    return [(int(key) // base, int(key) % base) for key in keys]


def _distinct_index(options: Options) -> Ints:
    return np.unique(_keys(options), return_inverse=True)[1]


def _owner(options: Options, work: Workload, speeds: Speeds, record: Ints,
           copied: NDArray[np.bool_]) -> tuple[Floats, Ints]:
    """What pieces cost the ranks that hold them: ([P, 6] ms, [P] buffer bytes)."""
    table = options.table[options.option]
    view = _View.of(work, table)
    pooled, copied = options.pooled[options.option], copied[options.option]
    share, columns = options.rows / work.rows[table], options.columns.astype(np.float64)
    world, element = speeds.peers + 1, _ELEMENT_BYTES
    lookups = view.features * np.where(pooled, view.ids, view.unique) * share
    answers = view.features * np.where(pooled, view.bags, view.unique * share)
    extra = np.where(pooled, view.features * view.bags, view.features)
    touched = share * view.step_unique
    wire = np.zeros((len(table), 3))
    wire[:, 0] = _ID_BYTES * (lookups + extra)
    wire[:, 1] = element * answers * columns
    wire[:, 2] = wire[:, 1]
    wire[copied, 0] = (_ID_BYTES * view.features * (view.unique + 1))[copied]
    wire[copied, 1] = 0
    wire[copied, 2] = (element * view.features * view.unique * columns)[copied]
    moved = element * columns * world * np.where(pooled, lookups + answers, lookups)
    phase = np.zeros((len(table), len(PHASES)))
    phase[:, [_IDS, _ROWS, _GRADIENTS]] = speeds.wire_byte * wire
    phase[:, _READ] = speeds.shard + touched * speeds.row(element * columns) + \
        speeds.stream_byte * moved
    phase[:, _UPDATE] = _REWRITE * touched * speeds.row(record.astype(np.float64)) + \
        speeds.stream_byte * moved
    # A copy reads for its own rank only, but merges the gradients of all.
    own = view.features * view.unique * speeds.row(element * columns) + speeds.stream_byte * \
        element * columns * view.features * (view.ids + view.bags)
    merged = element * columns * view.features * (world * view.unique + view.ids)
    phase[copied, _READ] = (speeds.shard + own)[copied]
    phase[copied, _UPDATE] = (_REWRITE * touched * speeds.row(record.astype(np.float64))
                              + speeds.stream_byte * merged)[copied]
    buffers = (world * wire.sum(axis=1)).astype(np.int64)
    return phase, buffers


def _source(options: Options, work: Workload, speeds: Speeds,
            copied: NDArray[np.bool_]) -> tuple[Floats, Ints]:
    """What options cost every rank for its own samples: ([O, 6] ms, [O] buffer bytes)."""
    view = _View.of(work, options.table)
    row_parts = np.array([cut.row_parts for cut in options.cuts], dtype=np.float64)
    col_parts = np.array([cut.col_parts for cut in options.cuts], dtype=np.float64)
    pooled = options.pooled & ~copied
    width = _ELEMENT_BYTES * view.features * view.columns
    phase = np.zeros((len(options.table), len(PHASES)))
    phase[:, _IDS] = np.where(
        pooled, speeds.stream_byte * 2 * _ID_BYTES * view.features * view.ids,
        view.features * view.ids * speeds.row(float(_ID_BYTES)))
    # Forward and backward each pass over the same elements once.
    passed = np.where(pooled, view.bags * (row_parts - 1), view.ids + view.bags + view.unique)
    phase[:, _POOL] = np.where(copied, 0.0, speeds.stream_byte * 2 * width * passed)
    inverse = _ID_BYTES * view.features * view.ids
    ids = _ID_BYTES * view.features * col_parts * np.where(
        pooled, view.ids + view.bags * row_parts, view.unique)
    rows = 2 * width * np.where(pooled, view.bags * row_parts, view.unique)
    bags = 2 * width * view.bags
    return phase, (inverse + ids + rows + bags).astype(np.int64)
