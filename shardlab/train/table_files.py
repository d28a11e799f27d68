"""Table rows and their optimiser state as chunk files: each rank writes its own shards.

A file holds one or more rectangles of tables, about `TableFiles.file_bytes` together. The manifest
says where each rectangle lies, so a rank that loads opens only the files that touch its shards,
whatever world size and plan they were written with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.storage import TableChunk
from shardlab.train.manifest import ALL, CHANGED, PRESENT, ChunkEntry
from shardlab.train.tensor_file import FileEntry, tell_nobody, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from shardlab.sharded import ShardedEmbeddingBagCollection
    from shardlab.sharded.row_watch import Snapshot
    from shardlab.train.checkpoint_reader import CheckpointReader

#: A file is closed once it holds this much: with chunks of half of it, the memory that saving
#: takes stays below 1.5 x this. A rank's part of the tables decides, between these bounds: a small
#: job's ranks save in 12 MiB, and 10 TB are some 40,000 files.
_LEAST_FILE_BYTES, _MOST_FILE_BYTES, _FILE_SHARE = 8 << 20, 256 << 20, 256


@dataclass(frozen=True)
class NamedChunk:
    """A chunk of a collection, and what its rows are."""

    collection: str
    chunk: TableChunk
    holds: str

    @property
    def num_bytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in _tensors(self.chunk).values())

    def copy(self) -> NamedChunk:
        """The same with tensors of its own, on the CPU."""
        chunk = self.chunk
        return replace(self, chunk=replace(
            chunk, weights=_copy(chunk.weights),
            state={name: _copy(value) for name, value in chunk.state.items()},
            present=None if chunk.present is None else _copy(chunk.present),
            extra={name: _copy(value) for name, value in chunk.extra.items()}))


@dataclass
class TableFiles:
    """What one rank has written.

    Attributes:
        folder: where the files go.
        rank: this rank.
        prefix: of the files' names.
        file_bytes: what a file holds, about; `file_bytes` of a collection.
        replica: which of how many ranks, that hold the same shards, this one is: each writes its
            share of the chunks.
        told: is told how many bytes more are written.
        files, chunks: entries for the manifest.
    """

    folder: Path
    rank: int
    prefix: str = "rows"
    file_bytes: int = _LEAST_FILE_BYTES
    replica: tuple[int, int] = (0, 1)
    told: Callable[[int], None] = tell_nobody
    files: list[FileEntry] = field(default_factory=list)
    chunks: list[ChunkEntry] = field(default_factory=list)
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _seen: int = 0

    def write(self, chunks: Iterable[NamedChunk]) -> None:
        """Streams chunks to files; rank 0 writes replicated tables."""
        for named in chunks:
            if self._is_mine(named.chunk):
                self._add(named)
                if sum(tensor.nbytes for tensor in self._pending.values()) \
                        >= self.file_bytes // 2:
                    self._flush()
        self._flush()

    def _is_mine(self, chunk: TableChunk) -> bool:
        if chunk.replicated:
            return self.rank == 0
        self._seen += 1
        number, count = self.replica
        return self._seen % count == number

    @property
    def _file_name(self) -> str:
        return f"{self.prefix}-{self.rank:05d}-{len(self.files):05d}.safetensors"

    def _add(self, named: NamedChunk) -> None:
        chunk, key = named.chunk, str(len(self.chunks))
        self.chunks.append(ChunkEntry(
            file=self._file_name, key=key, collection=named.collection, table=chunk.table,
            row_start=chunk.row_start, col_start=chunk.col_start, rows=chunk.num_rows,
            columns=chunk.weights.shape[1], state=tuple(sorted(chunk.state)), holds=named.holds,
            extra=tuple(sorted(chunk.extra))))
        self._pending |= {f"{key}/{name}": tensor.cpu()
                          for name, tensor in _tensors(chunk).items()}

    def _flush(self) -> None:
        if self._pending:
            self.files.append(write_tensors(self.folder / self._file_name, self._pending,
                                            self.told))
            self._pending.clear()


def file_bytes(tables_bytes: int) -> int:
    """What a file of this rank holds, where its part of the tables has ``tables_bytes``."""
    return min(max(tables_bytes // _FILE_SHARE, _LEAST_FILE_BYTES), _MOST_FILE_BYTES)


def _tensors(chunk: TableChunk) -> dict[str, Tensor]:
    """All tensors of a chunk by the names that they have in a file."""
    parts = {"weights": chunk.weights, **chunk.state,
             **{f"extra/{name}": value for name, value in chunk.extra.items()}}
    return parts if chunk.present is None else {**parts, "rows": chunk.present}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def other_chunks(name: str, collection: ShardedEmbeddingBagCollection) -> Iterator[NamedChunk]:
    """What of this rank's shards of a collection is not kept as rows."""
    for chunk in collection.snapshots.others(file_bytes(collection.tier_bytes().total) // 2):
        yield NamedChunk(name, chunk, ALL if chunk.present is None else PRESENT)


def snapshot_chunks(name: str, snapshot: Snapshot) -> Iterator[NamedChunk]:
    """The rows that a snapshot holds."""
    for chunk, changed in snapshot.chunks():
        yield NamedChunk(name, chunk, CHANGED if changed else
                         ALL if chunk.present is None else PRESENT)


def load_tables(reader: CheckpointReader, rank: int,
                collections: Mapping[str, ShardedEmbeddingBagCollection]) -> None:
    """Reads every chunk that touches this rank's shards, file by file.

    Args:
        reader: of the checkpoint.
        rank: this rank, as the collections' plans count.
        collections: the model's collections by name.

    Raises:
        CheckpointError: a file is damaged or does not hold what the manifest says.
    """
    shards = {(name, entry.table): [shard for shard in entry.shards if shard.rank == rank]
              for name, collection in collections.items() for entry in collection.plan.tables}
    for collection in collections.values():
        collection.begin_load()

    def wanted(entry: ChunkEntry) -> bool:
        return any(entry.row_start < shard.row_end and shard.row_start < entry.row_end
                   and entry.col_start < shard.col_end
                   and shard.col_start < entry.col_start + entry.columns
                   for shard in shards[entry.collection, entry.table])

    for name, chunk in reader.chunks(wanted):
        collections[name].load_chunk(chunk)
