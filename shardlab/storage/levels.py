"""Levels of a chain: where records are read from and written to, one call for several shards.

A level hands out a `MoveEnd`: where the records of some rows can be read or written right now. A
home in memory points at its rows; a home on disk at a buffer that it reads or writes; a cache at
slots, after it has brought the rows up from the level below. Rows are local to their shard. Jobs
are int64 [K, 3] on CPU, (shard number, start, count), ascending by shard, each shard at most once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardlab.codecs import rounding_key
from shardlab.ops.blocks import Blocks
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.moves import move_rows
from shardlab.ops.records import MoveEnd, Records
from shardlab.ops.rounding import Rounding
from shardlab.storage.arena import Arena


@dataclass
class Clock:
    """The step that random bits are addressed by.

    Attributes:
        seed: of the run.
        step: optimiser steps taken.
    """

    seed: int
    step: int = 0

    def key(self, stream: int) -> int:
        """Key of this step's random bits; every writer has a stream of its own."""
        return rounding_key(self.seed, self.step, stream)


class Level(Protocol):
    """What a cache asks of the level below it.

    Attributes:
        numbers: block of every shard in the ends that `source` and `target` give.
    """

    numbers: list[int]

    def source(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Where the records of these rows can be read until the next call."""

    def target(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """Where new records of these rows are to be written before `commit`."""

    def commit(self) -> None:
        """Takes over what was written to the last target."""

    def prefetch(self, jobs: Tensor, rows: Tensor) -> None:
        """Tells that these rows will be asked for soon."""

    def flush(self) -> None:
        """Writes everything to the home, and holds nothing more than it."""


class Home(Level, Protocol):
    """The level that holds every row."""

    def read_range(self, number: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """fp32 rows [count, columns] and states [count, elements] of a shard, on CPU."""

    def write_range(self, number: int, first: int, rows: Tensor | None,
                    state: Tensor | None) -> None:
        """Writes fp32 rows, or states, or both; in ascending order the first time."""


@dataclass
class MemoryHome:
    """All rows of some shards in memory.

    Attributes:
        arena: their blocks.
        numbers: block of every shard.
        clock: for rounding what is written by range.
    """

    arena: Arena
    numbers: list[int]
    clock: Clock

    @property
    def blocks(self) -> Blocks:
        """Where the shards lie."""
        return self.arena.blocks

    def source(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """The rows themselves."""
        return MoveEnd(self.arena.data, self.blocks, rows.to(self.arena.data.device))

    def target(self, jobs: Tensor, rows: Tensor) -> MoveEnd:
        """The rows themselves."""
        return self.source(jobs, rows)

    def commit(self) -> None:
        """Nothing: the target was the home."""

    def prefetch(self, jobs: Tensor, rows: Tensor) -> None:
        """Nothing: this is memory."""

    def flush(self) -> None:
        """Nothing: this is the home."""

    def read_range(self, number: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """fp32 rows and states of a shard, copied to the CPU."""
        block, part = self.numbers[number], slice(first, first + count)
        payloads = self.blocks.payloads(self.arena.data, block)[part]
        rows = torch.empty(count, int(self.blocks.table[block, 4]), device=payloads.device)
        decode_rows(payloads, self.blocks.encoding(block).codec, rows)
        if self.blocks.encoding(block).state_codec == "fp32":
            state = self.blocks.state(self.arena.data, block)[part].to("cpu", copy=True)
        else:
            state = self._records(number, first, count).read_states().cpu()
        return rows.cpu(), state

    def write_range(self, number: int, first: int, rows: Tensor | None,
                    state: Tensor | None) -> None:
        """Encodes fp32 rows, or states, or both."""
        block, device = self.numbers[number], self.arena.data.device
        encoding, key = self.blocks.encoding(block), self.clock.key(0)
        if rows is not None:
            rounding = Rounding(encoding.stochastic, key ^ encoding.table_key,
                                encoding.row_start + first, encoding.col_start)
            payloads = self.blocks.payloads(self.arena.data, block)[first:first + rows.shape[0]]
            encode_rows(rows.to(device), encoding.codec, payloads, rounding)
        if state is not None and encoding.state_codec == "fp32":
            self.blocks.state(self.arena.data, block)[first:first + state.shape[0]] = \
                state.to(device)
        elif state is not None:
            records = self._records(number, first, state.shape[0])
            records.write_states(state.to(device), records.words(key, None))

    def _records(self, number: int, first: int, count: int) -> Records:
        places = torch.arange(first, first + count, device=self.arena.data.device)
        return Records(self.arena.data, self.blocks, self.numbers[number], places)


def make_jobs(numbers: Tensor, shards: int) -> Tensor:
    """Jobs over a list that is sorted by shard number.

    Args:
        numbers: int64 [n], shard of every entry, ascending.
        shards: how many shards there are.
    """
    counts = torch.bincount(numbers, minlength=shards)
    jobs = torch.stack([torch.arange(shards), counts.cumsum(0) - counts, counts], 1)
    return jobs[counts > 0]


@dataclass(frozen=True)
class Moves:
    """Records that go from one level to the next.

    Attributes:
        jobs: int64 [K, 3] on CPU: (shard number, start, count).
        rows: int64 [n] on CPU, rows of their shards.
        row_starts: int64 [shards] on CPU: row of the table that a shard's row 0 is.
    """

    jobs: Tensor
    rows: Tensor
    row_starts: Tensor

    def run(self, ends: tuple[MoveEnd, MoveEnd], numbers: tuple[list[int], list[int]],
            key: int) -> None:
        """Moves from ends[0] to ends[1].

        Args:
            ends: their places go by ``rows``.
            numbers: block of every shard number, at either end.
            key: of the random bits.
        """
        shard, counts = self.jobs[:, 0], self.jobs[:, 2]
        segments = torch.stack([torch.tensor(numbers[0])[shard], torch.tensor(numbers[1])[shard],
                                self.jobs[:, 1], counts], 1)
        table_rows = self.rows + torch.repeat_interleave(self.row_starts[shard], counts)
        move_rows(*ends, segments, key, table_rows.to(ends[1].arena.device))
