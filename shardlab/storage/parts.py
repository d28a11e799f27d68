"""The storages of a rank by kind, and which shards' rows can be read while they train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from shardlab.storage.base import KeepsItself, LocalShard, RowReads, Storage, TableChunk
from shardlab.storage.mixed import MixedStorage


def parts_of(storage: Storage) -> list[tuple[Storage, list[int]]]:
    """The storages that a rank's storage is made of, each with the numbers of its shards in it."""
    if isinstance(storage, MixedStorage):
        return list(zip(storage.parts, storage.blocks, strict=True))
    return [(storage, list(range(len(storage.shards))))]


@dataclass(frozen=True)
class RowBlock:
    """A shard whose rows can be read while it trains.

    Attributes:
        local: the shard.
        storage: that holds it.
        number: its number there.
    """

    local: LocalShard
    storage: RowReads
    number: int

    @property
    def elements(self) -> int:
        """fp32 elements of a row and its state."""
        return self.storage.row_elements(self.number)

    def read_range(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """`RowReads.read_range`."""
        return self.storage.read_range(self.number, first, count)

    def read_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`RowReads.read_rows`."""
        return self.storage.read_rows(self.number, rows)

    def named_state(self, state: Tensor) -> dict[str, Tensor]:
        """`RowReads.named_state`."""
        return self.storage.named_state(self.number, state)


def row_blocks(storage: Storage) -> dict[int, RowBlock]:
    """The shards whose rows can be read while they train, by number."""
    return {block: RowBlock(storage.shards[block], part, number)
            for part, blocks in parts_of(storage) if isinstance(part, RowReads)
            for number, block in enumerate(blocks)}


def flush_rows(storage: Storage) -> None:
    """Writes what is cached of `row_blocks` to the homes."""
    for part, _ in parts_of(storage):
        if isinstance(part, RowReads):
            part.flush()


def kept_parts(storage: Storage) -> list[KeepsItself]:
    """The storages that keep what changes themselves."""
    return [part for part, _ in parts_of(storage) if isinstance(part, KeepsItself)]


def other_chunks(storage: Storage, max_bytes: int) -> Iterator[TableChunk]:
    """Streams the shards that are in neither `row_blocks` nor `kept_parts`, as `Storage.chunks`."""
    for part, _ in parts_of(storage):
        if not isinstance(part, (RowReads, KeepsItself)):
            yield from part.chunks(max_bytes)
