"""Bytes and milliseconds of every option and of its pieces.

The step is "ids out, rows back" (see `PHASES`). With W ranks and, per table: F features, B bags
and n ids of one feature on one rank, u different ids of all features on one rank, g different ids
of all features and ranks; and, per piece: a share s of the table's different ids, a share a of its
ids with repetitions, d of its D columns. A rank is charged what it does and receives as *owner* of
a piece; every rank also pays, as *source*, what its own samples cost. Between a piece's owner and
one source travel

    phase       unique rows         pooled bags              data_parallel (to every other rank)
    ids         i u s + 4 B         F (i n a + B + 4)        i u + 4
    rows        u s vectors         F B vectors              none
    grads       u s vectors         F B vectors              u vectors of D

A vector of d elements takes what `storage_bytes.payload_bytes` says of the wire's dtype; it is
encoded on one side and decoded on the other. Ids take the i = 1 to 5 bytes that the shard's last
row needs; 4 bytes count them. Lengths, a byte each, are not sent where all bags of all tables have
one id and the table is not cut by rows.

Times, with row(b) a random row of b bytes, stream(b) contiguous bytes, sort(i) the de-duplication
of i ids; entries e = u s (unique rows) or F n a (pooled bags), answers r = u s or F (n a + B),
touched rows t = g s; what reading, updating and fetching a row costs where it lies: `holding`:

    wire      bytes x max((ranks_per_host - 1) / intra, (W - ranks_per_host) / inter), the links'
              speeds at the step's mean message
    prefetch  rows that a cache misses, min(t, W F n a x its miss ratio), from the level below
    read      t read + stream(4 d W r): gather once, then copy or pool for every source
              (data_parallel: u read + stream(4 D u))
    update    sort(W e) + t update + stream(4 d W r): merge gradients, update once; where a
              row-wise optimiser's rows are cut into C column blocks also stream(4 d (W r + 4 t)),
              and 4 t bytes to each of the C - 1 others: squares of whole rows
    pool      unique rows: stream(4 D (F (2 n + B) + u)); pooled: stream(8 F D B k), k row blocks
    ids also  unique rows: sort(F n); pooled: stream(16 F n)
    dense     the dense model's products with their activations, the sum of its gradients, its
              optimiser
    overhead  Python and launches of a step

Between replica groups gradients or rows travel besides, as `replicas` has it: part of the update.

Every exchange also takes a message to each other rank; ids need two (counts first). On one rank
pooled bags go straight from the table to the model: no pool phase. Of k row blocks the first of
every column block is priced as the fullest, the others share the rest alike.

Behind a link (CUDA) the rows of the next batch are prefetched while the dense part runs: only the
time that prefetching exceeds it counts (`placement.Problem.window_ms`). Without one both need the
same cores, and all of it counts. The other phases follow one another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.costs import Costs, Priced
from shardlab.planner.enumerate import Options
from shardlab.planner.replicas import all_groups, sync_bytes, sync_ms
from shardlab.planner.request import Request
from shardlab.planner.row_costs import RowCosts
from shardlab.planner.sizes import piece_bytes
from shardlab.planner.speeds import Speeds
from shardlab.planner.workload import Workload
from shardlab.storage_bytes import ROW_WISE_OPTIMIZERS, payload_bytes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

#: Phases of a step: de-duplicate and send ids; caches fill; owners read rows; rows travel; sources
#: expand and pool (and undo that for gradients); gradients travel; owners update; the dense part;
#: bookkeeping.
PHASES = ("ids", "prefetch", "read", "rows", "pool", "grads", "update", "dense", "overhead")
_IDS, _PREFETCH, _READ, _ROWS, _POOL, _GRADS, _UPDATE, _DENSE, _OVERHEAD = range(len(PHASES))
PREFETCH = _PREFETCH

_FP32_BYTES = 4
_COUNT_BYTES = 4
_MEAN_ID_BYTES = 3
_LENGTH_BYTES = 1  # bags of more than 255 ids take more
# Ids and positions inside a rank.
_INT64_BYTES = 8
# Passes of touched rows that squares of whole rows take: sums written and read, squares likewise.
_SQUARE_PASSES = 4
# Options that are priced at once, so that intermediate arrays stay in the cache.
_CHUNK = 1 << 15


@dataclass(frozen=True)
class _View:
    """Work of the table of each of some options, arrays [n]."""

    features: Floats
    bags: Floats
    ids: Floats
    unique: Floats
    touched: Floats
    width: Floats
    length_bags: Floats


class Pricer:
    """Prices options of a request.

    Args:
        request: tables, machine, batch, optimiser, wire.
        work: the tables' work in a step.
    """

    def __init__(self, request: Request, work: Workload) -> None:
        self.request, self.work = request, work
        self.speeds = Speeds(request.topology,
                             all_groups(request.topology, request.settings.replicas))
        wire = request.settings.wire
        self.forward, self.backward = wire.forward, wire.backward
        self.told = bool((work.ids != work.bags).any())
        self._ratios: dict[float, Floats] = {}
        means = self._mean_messages()
        self.wire_ms = [self.speeds.wire_byte(mean) for mean in means]

    @property
    def fixed_phase_ms(self) -> Floats:
        """[phases] milliseconds of a step whatever the plan."""
        fixed = np.zeros(len(PHASES))
        fixed[[_IDS, _ROWS, _GRADS]] = self.speeds.messages * np.array([2, 1, 1])
        fixed[_UPDATE] = sync_ms(self.request, self.work)
        fixed[_DENSE] = self.dense_ms
        fixed[_OVERHEAD] = self.speeds.overhead
        return fixed

    @property
    def sync_bytes(self) -> float:
        """Bytes that an average rank sends in a step to other replica groups."""
        return sync_bytes(self.request, self.work)

    @property
    def dense_ms(self) -> float:
        """Milliseconds of the dense part."""
        return self.speeds.dense(self.request.settings.dense, self.request.batch_size)

    @property
    def window_ms(self) -> float:
        """Milliseconds of prefetching that cost nothing."""
        return self.dense_ms if self.speeds.behind_link else 0.0

    def costs(self, options: Options) -> Costs:
        """Times and bytes of every option."""
        count = len(options)
        busy, fetch = np.empty((count, 2)), np.empty((count, 2))
        common, common_bytes = np.empty(count), np.empty(count, dtype=np.int64)
        size = piece_bytes(options, self.request.optimizer)
        for start in range(0, count, _CHUNK):
            some = slice(start, min(start + _CHUNK, count))
            priced = self.price(options, np.arange(some.start, some.stop))
            fetch[some] = priced.phase_ms[:, :, _PREFETCH]
            busy[some] = priced.phase_ms.sum(axis=2) - fetch[some]
            common[some] = priced.common_phase_ms.sum(axis=1)
            common_bytes[some] = priced.common_bytes
            size[some, 0] += priced.buffer_bytes
        return Costs(busy, fetch, common, size, common_bytes, float(self.fixed_phase_ms.sum()))

    def price(self, options: Options, chosen: Ints) -> Priced:
        """Phases and buffers of some options."""
        view = self._view(options, chosen)
        shares = self._shares(options, chosen)
        phases = np.zeros((len(chosen), 2, len(PHASES)))
        rows = RowCosts(options, chosen, self.request.optimizer, self.speeds)
        written = np.zeros((len(chosen), 2))
        for which, share in enumerate(shares):
            written[:, which] = rows.written(*self._accesses(view, share), self._miss_ratio)
            self._wire(phases[:, which], options, chosen, view, share)
            self._rows(phases[:, which], rows, view, share)
            if self.request.optimizer in ROW_WISE_OPTIMIZERS:
                self._squares(phases[:, which], options, chosen, view, share)
        wire = self._wire_bytes(options, chosen, view, shares[0])
        vectors = _FP32_BYTES * options.columns[chosen] * wire[1]
        held = wire[0] + vectors * np.where(options.copied[chosen], 1, 2)
        common, common_bytes = self._source(options, chosen, view)
        return Priced(phases, (self.speeds.world * held).astype(np.int64), common, common_bytes,
                      written)

    def _view(self, options: Options, chosen: Ints) -> _View:
        work, table = self.work, options.table[chosen]
        told = self.told | (options.row_parts[chosen] > 1)
        return _View(work.features[table], work.bags[table], work.ids[table], work.unique[table],
                     work.step_unique[table], work.columns[table],
                     np.where(told, work.bags[table], 0.0))

    def _shares(self, options: Options, chosen: Ints) -> tuple[tuple[Floats, Floats], ...]:
        """Shares of different ids and of ids, of the first piece and of another."""
        table, parts = options.table[chosen], options.row_parts[chosen]
        starts = np.flatnonzero(np.append(True, (np.diff(table) != 0) | (np.diff(parts) != 0)))
        lengths = np.diff(np.append(starts, len(chosen)))
        of, cut = table[starts], parts[starts]
        access, others = self.work.access, np.maximum(cut - 1, 1)
        unique = self.speeds.world * self.work.unique[of]
        first = np.where(cut == 1, 1.0, access.fullest_unique_block(of, cut, unique))
        most = np.where(cut == 1, 1.0, access.fullest_block(of, cut))
        rest = np.where(cut == 1, 1.0, (1 - first) / others)
        less = np.where(cut == 1, 1.0, (1 - most) / others)
        first, most, rest, less = (np.repeat(share, lengths)
                                   for share in (first, most, rest, less))
        return (first, most), (rest, less)

    def _vector_bytes(self, columns: Ints) -> Floats:
        """[n, 2] bytes of a vector on the wire, forward and backward."""
        widths, index = np.unique(columns, return_inverse=True)
        sizes = [[payload_bytes(dtype, width) for dtype in (self.forward, self.backward)]
                 for width in widths.tolist()]
        return np.array(sizes, dtype=np.float64)[index]

    def _wire_bytes(self, options: Options, chosen: Ints, view: _View,
                    share: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Between a piece's owner and one source: bytes of ids, and number of vectors."""
        pooled, (unique, most) = options.pooled[chosen], share
        rows = options.rows[chosen]
        id_bytes = 1 + sum((rows > 256.0**width).astype(np.int64) for width in range(1, 8))
        ids = np.where(pooled, view.features * view.ids * most, view.unique * unique)
        lengths = np.where(pooled, view.features * view.length_bags * _LENGTH_BYTES, 0.0)
        counts = np.where(pooled, view.features, 1.0)
        vectors = np.where(pooled, view.features * view.bags, view.unique * unique)
        return id_bytes * ids + lengths + _COUNT_BYTES * counts, vectors

    def _wire(self, phase: Floats, options: Options, chosen: Ints, view: _View,
              share: tuple[Floats, Floats]) -> None:
        """Fills in what travels: phases [n, phases] of a piece with these shares on its owner."""
        speeds, world = self.speeds, self.speeds.world
        id_bytes, vectors = self._wire_bytes(options, chosen, view, share)
        answers = np.where(options.copied[chosen], 0.0, vectors)
        size = self._vector_bytes(options.columns[chosen])
        fp32 = np.asarray(options.columns[chosen] * _FP32_BYTES, dtype=np.float64)
        phase[:, _IDS] = self.wire_ms[0] * id_bytes
        phase[:, _ROWS] = answers * (self.wire_ms[1] * size[:, 0] + self._coding(
            self.forward, fp32, speeds.encode * world))
        phase[:, _GRADS] = vectors * (self.wire_ms[2] * size[:, 1] + self._coding(
            self.backward, fp32, speeds.decode * world))

    def _rows(self, phase: Floats, rows: RowCosts, view: _View,
              share: tuple[Floats, Floats]) -> None:
        """Fills in what an owner does with its rows."""
        speeds, world, (unique, most) = self.speeds, self.speeds.world, share
        copied, pooled = rows.copied, rows.pooled
        touched = unique * view.touched
        entries = np.where(pooled, view.features * view.ids * most, view.unique * unique)
        answers = entries + np.where(pooled, view.features * view.bags, 0.0)
        moved = speeds.stream * _FP32_BYTES * rows.columns * answers
        # A copy reads for its own rank only, but merges the gradients of all.
        phase[:, _READ] = speeds.shard + np.where(copied, moved, world * moved) + rows.read(
            np.where(copied, view.unique, touched))
        phase[:, _UPDATE] = speeds.sort * world * entries + world * moved + rows.update(touched)
        phase[:, _PREFETCH] = rows.fetch(*self._accesses(view, share), self._miss_ratio)

    def _accesses(self, view: _View, share: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Different rows and ids that a step asks of a piece."""
        unique, most = share
        return unique * view.touched, self.speeds.world * view.features * view.ids * most

    def _squares(self, phase: Floats, options: Options, chosen: Ints, view: _View,
                 share: tuple[Floats, Floats]) -> None:
        """Adds what a row-wise optimiser needs of the other column blocks of its rows."""
        speeds, (unique, most) = self.speeds, share
        cut, columns = options.col_parts[chosen], options.columns[chosen]
        touched = unique * view.touched
        answers = np.where(options.pooled[chosen], view.features * (view.ids * most + view.bags),
                           view.unique * unique)
        passes = speeds.world * answers + _SQUARE_PASSES * touched
        # A wire's byte goes to all others; squares go to those that hold the same rows.
        others = np.minimum((cut - 1) / max(speeds.world - 1, 1), 1.0)
        phase[:, _UPDATE] += np.where(cut > 1, speeds.stream * _FP32_BYTES * columns * passes
                                      + self.wire_ms[2] * others * _FP32_BYTES * touched, 0.0)

    @staticmethod
    def _coding(dtype: str, fp32: Floats, ms: float) -> Floats:
        """ms to encode or decode vectors of so many fp32 bytes."""
        return np.zeros(1) if dtype == "fp32" else ms * fp32

    def _miss_ratio(self, fraction: float) -> Floats:
        """[T] of caches that hold so large a share of the rows."""
        if fraction not in self._ratios:
            every = np.arange(len(self.work.rows))
            self._ratios[fraction] = self.work.access.miss_ratio(every, fraction * self.work.rows)
        return self._ratios[fraction]

    def _source(self, options: Options, chosen: Ints, view: _View) -> tuple[Floats, Ints]:
        """What options cost every rank for its own samples: ([n, phases] ms, [n] buffers)."""
        speeds, pooled = self.speeds, options.pooled[chosen]
        ids, bags = view.features * view.ids, view.features * view.bags
        width = _FP32_BYTES * view.width
        parts = options.row_parts[chosen] * (speeds.world > 1)
        phase = np.zeros((len(chosen), len(PHASES)))
        phase[:, _IDS] = ids * np.where(pooled, speeds.stream * 2 * _INT64_BYTES, speeds.sort)
        # Forward reads a row per id and writes bags; backward reads a gradient per id and writes
        # one per unique id. Bags that come in parts are added up, and their gradients sent in
        # parts.
        passed = np.where(pooled, 2 * bags * parts, 2 * ids + bags + view.unique)
        phase[:, _POOL] = speeds.stream * width * passed
        vectors = np.where(pooled, bags * parts, view.unique)
        received = np.where(options.copied[chosen], 0.0, vectors)
        phase[:, _ROWS] = received * self._coding(self.forward, width, speeds.decode)
        phase[:, _GRADS] = vectors * self._coding(self.backward, width, speeds.encode)
        sent = options.col_parts[chosen] * np.where(
            pooled, ids + view.features * view.length_bags * parts, view.unique)
        size = _INT64_BYTES * (ids + sent) + 2 * width * (vectors + bags)
        return phase, size.astype(np.int64)

    def _mean_messages(self) -> tuple[float, float, float]:
        """Bytes of a step's mean message of ids, rows and gradients, every table exchanged in the
        way that sends fewer vectors."""
        work, world = self.work, self.speeds.world
        vectors = np.minimum(work.unique, work.features * work.bags)
        columns = work.columns.astype(np.int64)
        size = self._vector_bytes(columns)
        return (float(_MEAN_ID_BYTES * work.unique.sum() / world),
                float(vectors @ size[:, 0] / world), float(vectors @ size[:, 1] / world))
