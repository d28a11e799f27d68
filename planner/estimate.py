"""Bytes and milliseconds of every piece of every option.

The step is "ids out, rows back" (see `PHASES`). With W ranks and, per table: F features, B bags
and n ids of one feature on one rank, u different ids of all features on one rank, g different ids
of all features and ranks; and, per piece: a share s of the table's rows, d of its D columns. A
rank is charged what it does and receives as *owner* of a piece; every rank also pays, as
*source*, what its own samples cost. Bytes between a piece's owner and one source:

    phase       unique rows    pooled bags              data_parallel (to every other rank)
    ids         4 u s + 8      F (4 n s + 4 B + 8)      4 u + 8
    rows        4 u s d        4 F B d                  0
    grads       4 u s d        4 F B d                  4 u D

Ids take 4 bytes, 8 if a shard has 2^31 rows or more; 8 bytes count them. Lengths, 4 B, are not sent
where all bags of all tables have one id and the table is not cut by rows.

Times, with row(b) = 1 / rows_per_s + b / row_bytes_per_s for a random row of b bytes, stream(b) =
b / stream_bytes_per_s, sort(i) = i / ids_per_s; entries e = u s (unique rows) or F n s (pooled
bags), answers a = u s or F (n s + B):

    wire      bytes x max((ranks_per_host - 1) / intra, (W - ranks_per_host) / inter)
    read      s g row(4 d) + stream(4 d W a): gather once, then copy or pool for every source
              (data_parallel: u row(4 D) + stream(4 D u))
    update    sort(W e) + 1.1 s g row(record) + stream(4 d W a): merge gradients, update once
    pool      unique rows: stream(4 D (F (2 n + B) + u)); pooled: stream(8 F D B k), k row blocks
    ids also  unique rows: sort(F n); pooled: stream(16 F n)

Every exchange also takes a message to each other rank; ids need two (counts first). On one rank
pooled bags go straight from the table to the model: no pool phase. Not in the model yet: ids more
frequent in one row block than in another, overlap of phases, the dense model's time, storage
below HBM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.enumerate import Options
from shardlab.planner.topology import Topology
from shardlab.planner.workload import Workload
from shardlab.specs import EmbeddingBagConfig, ShardingType, Tier, tier_bytes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Phases of a step, in order: de-duplicate and send ids; owners read rows; rows travel; sources
#: expand and pool (and undo that for gradients); gradients travel; owners update.
PHASES = ("ids", "read", "rows", "pool", "grads", "update")
_IDS, _READ, _ROWS, _POOL, _GRADS, _UPDATE = range(len(PHASES))

_ELEMENT_BYTES = 4
_COUNT_BYTES = 8
# Ids and positions inside a rank.
_INT64_BYTES = 8
# The runtime sends ids as int32 where every shard has fewer rows than this.
_INT32_ROWS = 1 << 31
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
    """

    phase_ms: Floats
    table_bytes: Ints
    buffer_bytes: Ints
    common_phase_ms: Floats
    common_bytes: Ints
    fixed_phase_ms: Floats

    @cached_property
    def ms(self) -> Floats:
        """[P] a piece's milliseconds on its owner."""
        total: Floats = self.phase_ms.sum(axis=1)
        return total

    @cached_property
    def bytes(self) -> Ints:
        """[P] a piece's bytes on its owner."""
        return self.table_bytes + self.buffer_bytes

    @cached_property
    def common_ms(self) -> Floats:
        """[O] milliseconds on every rank."""
        total: Floats = self.common_phase_ms.sum(axis=1)
        return total

    @property
    def fixed_ms(self) -> float:
        """Milliseconds of a step whatever the plan."""
        return float(self.fixed_phase_ms.sum())


class Speeds:
    """Milliseconds of the elementary acts on one rank of a topology."""

    def __init__(self, topology: Topology) -> None:
        memory = topology.memory
        near = topology.ranks_per_host - 1
        far = topology.world_size - topology.ranks_per_host
        intra, inter = topology.intra_host, topology.inter_host
        self.world = topology.world_size
        self.access = _MS / memory.rows_per_s
        self.row_byte = _MS / memory.row_bytes_per_s
        self.stream_byte = _MS / memory.stream_bytes_per_s
        self.sort = _MS / memory.ids_per_s
        # Links within and between hosts run side by side.
        self.wire_byte = _MS * max(near / intra.bytes_per_s, far / inter.bytes_per_s)
        self.message = _MS * (near * intra.latency_s + far * inter.latency_s)
        self.shard = _MS * topology.shard_overhead_s

    def row(self, size: Floats | float) -> Floats:
        """A random access to a row of ``size`` bytes."""
        return np.asarray(self.access + self.row_byte * size)


@dataclass(frozen=True)
class _View:
    """Workload and choices, every array indexed alike: by piece or by option."""

    features: Floats
    bags: Floats
    ids: Floats
    unique: Floats
    step_unique: Floats
    columns: Floats
    row_parts: Floats
    col_parts: Floats
    pooled: Bools
    copied: Bools

    @property
    def length_bags(self) -> Floats:
        """Bags whose length must be told: all, unless every bag of every table has one id."""
        told = (self.ids != self.bags).any() | (self.row_parts > 1)
        return np.where(told, self.bags, 0.0)

    @staticmethod
    def of(work: Workload, options: Options, option: Ints) -> _View:
        table = options.table[option]
        copied = np.array([cut.sharding is ShardingType.DATA_PARALLEL for cut in options.cuts])
        return _View(work.features[table], work.bags[table], work.ids[table],
                     work.unique[table], work.step_unique[table], work.columns[table],
                     np.array([cut.row_parts for cut in options.cuts])[option],
                     np.array([cut.col_parts for cut in options.cuts])[option],
                     options.pooled[option], copied[option])


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
    record = _record_bytes(tables, options, optimizer)
    view = _View.of(work, options, options.option)
    share = options.rows / work.rows[options.table[options.option]]
    id_bytes = 4 if options.rows.max() < _INT32_ROWS else 8
    wire = _wire_bytes(view, share, options.columns, id_bytes)
    phase_ms = _memory_ms(view, share, options.columns, record, speeds)
    phase_ms[:, [_IDS, _ROWS, _GRADS]] = speeds.wire_byte * wire
    common_ms, common_bytes = _source(options, work, speeds)
    fixed = np.zeros(len(PHASES))
    fixed[[_IDS, _ROWS, _GRADS]] = speeds.message * np.array([2, 1, 1])
    return Costs(phase_ms, options.rows * record,
                 (speeds.world * wire.sum(axis=1)).astype(np.int64),
                 common_ms, common_bytes, fixed)


def _record_bytes(tables: Sequence[EmbeddingBagConfig], options: Options,
                  optimizer: str) -> Ints:
    """[P] bytes of one row of each piece; `tier_bytes` of a ``rows`` storage is linear in rows."""
    base = int(options.columns.max()) + 1
    keys, index = np.unique(options.table[options.option] * base + options.columns,
                            return_inverse=True)
    sizes = [tier_bytes(tables[key // base].storage, Tier.HBM, 1, key % base, optimizer).total
             for key in keys.tolist()]
    return np.array(sizes, dtype=np.int64)[index]


def _wire_bytes(view: _View, share: Floats, columns: Ints, id_bytes: int) -> Floats:
    """[P, 3] bytes of ids, rows and gradients between a piece's owner and one source."""
    ids = np.where(view.pooled, view.features * (view.ids * share + view.length_bags),
                   view.unique * share)
    counts = np.where(view.pooled, view.features, 1.0)
    vectors = columns * np.where(view.pooled, view.features * view.bags, view.unique * share)
    rows = np.where(view.copied, 0.0, vectors)
    return np.stack([id_bytes * ids + _COUNT_BYTES * counts, _ELEMENT_BYTES * rows,
                     _ELEMENT_BYTES * vectors], axis=1)


def _memory_ms(view: _View, share: Floats, columns: Ints, record: Ints,
               speeds: Speeds) -> Floats:
    """[P, 6] read and update of the pieces; the other phases are left at zero."""
    row_bytes = (_ELEMENT_BYTES * columns).astype(np.float64)
    touched = share * view.step_unique
    entries = np.where(view.pooled, view.features * view.ids * share, view.unique * share)
    answers = entries + np.where(view.pooled, view.features * view.bags, 0.0)
    stream = speeds.stream_byte * row_bytes
    phase = np.zeros((len(share), len(PHASES)))
    # A copy reads for its own rank only, but merges the gradients of all.
    phase[:, _READ] = speeds.shard + \
        np.where(view.copied, view.unique, touched) * speeds.row(row_bytes) + \
        stream * np.where(view.copied, view.unique, speeds.world * answers)
    phase[:, _UPDATE] = speeds.sort * speeds.world * entries + \
        _REWRITE * touched * speeds.row(record.astype(np.float64)) + \
        stream * speeds.world * answers
    return phase


def _source(options: Options, work: Workload, speeds: Speeds) -> tuple[Floats, Ints]:
    """What options cost every rank for its own samples: ([O, 6] ms, [O] buffer bytes)."""
    view = _View.of(work, options, np.arange(len(options.table)))
    ids, bags = view.features * view.ids, view.features * view.bags
    width = _ELEMENT_BYTES * view.columns
    parts = view.row_parts * (speeds.world > 1)
    phase = np.zeros((len(options.table), len(PHASES)))
    phase[:, _IDS] = ids * np.where(view.pooled, speeds.stream_byte * 2 * _INT64_BYTES,
                                    speeds.sort)
    # Forward reads a row per id and writes bags; backward reads a gradient per id and writes one
    # per unique id. Bags that come in parts are added up, and their gradients sent in parts.
    passed = np.where(view.pooled, 2 * bags * parts, 2 * ids + bags + view.unique)
    phase[:, _POOL] = speeds.stream_byte * width * passed
    sent = view.col_parts * np.where(
        view.pooled, ids + view.features * view.length_bags * view.row_parts, view.unique)
    rows = 2 * width * np.where(view.pooled, bags * parts, view.unique)
    size = _INT64_BYTES * (ids + sent) + rows + 2 * width * bags
    return phase, size.astype(np.int64)
