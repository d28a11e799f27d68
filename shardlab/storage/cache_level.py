"""A cache level of several shards: slots in an arena, an index of who is in them, a level below.

A row's newest value is in the nearest level that holds it. Rows that get no slot in a batch,
because the batch is larger than the cache or admission refuses them, are staged behind the slots
and written down as soon as they were changed.

Source: own; full-precision caches above narrow rows as in arXiv
2010.11305, tiers as in arXiv 2104.05158.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardlab.errors import StorageError
from shardlab.ops.cache import COUNTERS, Placement, build_cache_index, cache_lookup, cache_place
from shardlab.ops.cache_contents import cache_drop
from shardlab.ops.cache_index import CacheBlock, CacheIndex
from shardlab.ops.records import MoveEnd
from shardlab.storage.arena import Arena
from shardlab.storage.levels import Clock, Level, Moves, make_jobs
from shardlab.tiers import allocate

#: Streams of random bits. A row that is staged is rounded as if it had been stepped in its home:
#: with the bits of the update itself.
_STAGED, _FILL, _WRITE_BACK = 0, 1, 2
_STREAMS = 3


@dataclass
class CacheLevel:
    """Slots above a lower level, for the shards of one chain.

    Attributes:
        arena: the blocks that hold slots and, behind them, staging rows.
        numbers: block of every shard.
        caches: shape and policy of every shard's cache.
        row_starts: int64 [shards] on CPU: row of the table that a shard's row 0 is.
        below: the next level.
        clock: addresses random bits.
        depth: 0 for the level next to the kernels.
        index: who is where.
        counters: int64 [shards, 6], columns as `shardlab.ops.cache.COUNTERS`, since the start.
        moved: int64 [shards]: records brought up and written down since the start.
    """

    arena: Arena
    numbers: list[int]
    caches: Sequence[CacheBlock]
    row_starts: Tensor
    below: Level
    clock: Clock
    depth: int = 0
    index: CacheIndex = field(init=False)
    counters: Tensor = field(init=False)
    moved: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = sum(cache.layout.metadata_bytes for cache in self.caches)
        self.index = build_cache_index(self.caches, allocate(size, torch.device("cpu")))
        self.counters = torch.zeros(len(self.caches), len(COUNTERS), dtype=torch.int64)
        self.moved = torch.zeros(len(self.caches), dtype=torch.int64)
        self._slots = torch.tensor([cache.layout.slots for cache in self.caches])
        self._room = self.arena.blocks.table[self.numbers, 5]
        self._staged: Moves | None = None
        self._staged_places = torch.empty(0, dtype=torch.int64)

    # ------------------------------------------------------------------ rows in use
    def place(self, jobs: Tensor, rows: Tensor, *, fill: bool = True, write: bool = False,
              touch: bool = True) -> Tensor:
        """Gives every row a place in this level's blocks, until the next call.

        Args:
            jobs: which shard the rows are of.
            rows: int64 [n] on CPU, duplicates allowed.
            fill: bring the rows' records up; else the caller will write them.
            write: they will be changed; call `settle` afterwards.
            touch: counts as a use.

        Returns:
            int64 [n] on CPU.
        """
        placement = cache_place(self.index, jobs, rows, self.clock.step, touch=touch, write=write)
        if touch:
            self.counters += placement.counters
        self._write_back(placement.evictions)
        staged = self._stage(placement)
        if fill and placement.fills.shape[0]:
            moves = Moves(make_jobs(placement.fills[:, 0], len(self.caches)),
                          placement.fills[:, 1].contiguous(), self.row_starts)
            self.moved[moves.jobs[:, 0]] += moves.jobs[:, 2]
            source = self.below.source(moves.jobs, moves.rows)
            moves.run((source, self._end(placement.fills[:, 2])),
                      (self.below.numbers, self.numbers), self._key(_FILL))
        if write:
            self._staged, self._staged_places = staged
        return placement.places

    def settle(self) -> None:
        """Writes the staging rows of the last `place` with ``write`` to the level below."""
        moves, self._staged = self._staged, None
        if moves is not None and moves.rows.numel():
            self._send_down(moves, self._staged_places, _STAGED)

    def _stage(self, placement: Placement) -> tuple[Moves, Tensor]:
        fills = placement.fills
        staged = fills[fills[:, 2] >= self._slots[fills[:, 0]]]
        over = staged[:, 2] >= self._room[staged[:, 0]]
        if bool(over.any()):
            number = int(staged[over.nonzero()[0], 0])
            raise StorageError(
                f"cache {number}: a batch needs {int(staged[:, 2].max()) + 1} rows at once, there "
                f"is room for {int(self._room[number])}; use a smaller batch or a larger fraction")
        return (Moves(make_jobs(staged[:, 0], len(self.caches)), staged[:, 1].contiguous(),
                      self.row_starts), staged[:, 2].contiguous())

    def _write_back(self, evictions: Tensor) -> None:
        dirty = evictions[evictions[:, 3] == 1]
        if dirty.shape[0]:
            moves = Moves(make_jobs(dirty[:, 0], len(self.caches)), dirty[:, 2].contiguous(),
                          self.row_starts)
            self._send_down(moves, dirty[:, 1], _WRITE_BACK)

    def _send_down(self, moves: Moves, places: Tensor, stream: int) -> None:
        self.moved[moves.jobs[:, 0]] += moves.jobs[:, 2]
        target = self.below.target(moves.jobs, moves.rows)
        moves.run((self._end(places), target), (self.numbers, self.below.numbers),
                  self._key(stream))
        self.below.commit()

    def _end(self, places: Tensor) -> MoveEnd:
        return MoveEnd(self.arena.data, self.arena.blocks,
                       places.contiguous().to(self.arena.data.device))

    def _key(self, stream: int) -> int:
        return self.clock.key(self.depth * _STREAMS + stream)

    # ------------------------------------------------------------------ as a level below another
    def source(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Brings the rows up, and points at them."""
        return self._end(self.place(jobs, rows))

    def target(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Slots for records that come from above: nothing is brought up."""
        return self._end(self.place(jobs, rows, fill=False, write=True, touch=False))

    def commit(self) -> None:
        """Passes on what got no slot."""
        self.settle()

    def prefetch(self, jobs: Tensor, rows: Tensor) -> None:
        """Passes on the rows that are not here."""
        missing = cache_lookup(self.index, jobs, rows) < 0
        shard = torch.repeat_interleave(jobs[:, 0], jobs[:, 2])
        if bool(missing.any()):
            self.below.prefetch(make_jobs(shard[missing], len(self.caches)), rows[missing])

    def flush(self) -> None:
        """Writes every changed row down, and empties the cache."""
        dropped = cache_drop(self.index)
        self._write_back(dropped)
        self.below.flush()
