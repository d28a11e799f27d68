"""Table rows and their optimiser state as chunk files: each rank writes its own shards.

A file holds one or more rectangles of tables, about `FILE_BYTES` together. The manifest says
where each rectangle lies, so a rank that loads opens only the files that touch its shards,
whatever world size and plan they were written with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.errors import CheckpointError
from shardlab.storage import TableChunk
from shardlab.train.manifest import ChunkEntry, Manifest
from shardlab.train.tensor_file import FileEntry, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from shardlab.plan import Shard
    from shardlab.sharded import ShardedEmbeddingBagCollection

#: A file is closed once it holds this much: with chunks of half of it, the memory that saving
#: takes stays below 1.5 x this, while a 100 GB model is some six thousand files.
FILE_BYTES = 16 << 20
_CHUNK_BYTES = FILE_BYTES // 2


def write_tables(folder: Path, collections: Mapping[str, ShardedEmbeddingBagCollection],
                 rank: int) -> tuple[list[FileEntry], list[ChunkEntry]]:
    """Streams this rank's shards of all collections to files; rank 0 writes replicated tables.

    Args:
        folder: where the files go.
        collections: the model's collections by name.
        rank: this rank.

    Returns:
        (files, chunks) that this rank wrote.
    """
    files: list[FileEntry] = []
    chunks: list[ChunkEntry] = []
    pending: dict[str, Tensor] = {}
    file_name = _file_name(rank, 0)
    for name, chunk in _own_chunks(collections, rank):
        key = str(len(chunks))
        chunks.append(ChunkEntry(
            file=file_name, key=key, collection=name, table=chunk.table,
            row_start=chunk.row_start, col_start=chunk.col_start, rows=chunk.num_rows,
            columns=chunk.weights.shape[1], state=tuple(sorted(chunk.state)),
            extra=tuple(sorted(chunk.extra)), sparse=chunk.present is not None))
        pending[f"{key}/weights"] = chunk.weights.cpu()
        pending |= {f"{key}/{field}": tensor.cpu() for field, tensor in chunk.state.items()}
        pending |= {f"{key}/extra.{field}": tensor for field, tensor in chunk.extra.items()}
        if chunk.present is not None:
            pending[f"{key}/present"] = chunk.present
        if sum(tensor.nbytes for tensor in pending.values()) >= FILE_BYTES - _CHUNK_BYTES:
            files.append(write_tensors(folder / file_name, pending))
            pending.clear()
            file_name = _file_name(rank, len(files))
    if pending:
        files.append(write_tensors(folder / file_name, pending))
    return files, chunks


def _file_name(rank: int, index: int) -> str:
    return f"rows-{rank:05d}-{index:05d}.safetensors"


def _own_chunks(collections: Mapping[str, ShardedEmbeddingBagCollection],
                rank: int) -> Iterator[tuple[str, TableChunk]]:
    for name, collection in collections.items():
        for chunk in collection.chunks(_CHUNK_BYTES):
            if rank == 0 or not chunk.replicated:
                yield name, chunk


def load_tables(folder: Path, manifest: Manifest,
                collections: Mapping[str, ShardedEmbeddingBagCollection], rank: int) -> None:
    """Loads the rectangles that overlap this rank's shards, one verified file at a time.

    Raises:
        CheckpointError: a file is missing, torn or corrupted, or lacks a tensor; names it.
    """
    shards = {(name, table.table): [shard for shard in table.shards if shard.rank == rank]
              for name, collection in collections.items() for table in collection.plan.tables}
    wanted: dict[str, list[ChunkEntry]] = {}
    for chunk in manifest.chunks:
        if any(_overlap(chunk, shard) for shard in shards[chunk.collection, chunk.table]):
            wanted.setdefault(chunk.file, []).append(chunk)
    for collection in collections.values():
        collection.begin_load()
    for file_name, entries in wanted.items():
        tensors = read_tensors(folder, manifest.file(file_name, folder))
        for entry in entries:
            collections[entry.collection].load_chunk(_build_chunk(folder, entry, tensors))


def _overlap(chunk: ChunkEntry, shard: Shard) -> bool:
    return chunk.row_start < shard.row_end and shard.row_start < chunk.row_start + chunk.rows \
        and chunk.col_start < shard.col_end and shard.col_start < chunk.col_start + chunk.columns


def _build_chunk(folder: Path, entry: ChunkEntry, tensors: Mapping[str, Tensor]) -> TableChunk:
    try:
        weights = tensors[f"{entry.key}/weights"]
        state = {field: tensors[f"{entry.key}/{field}"] for field in entry.state}
        extra = {field: tensors[f"{entry.key}/extra.{field}"] for field in entry.extra}
        present = tensors[f"{entry.key}/present"] if entry.sparse else None
    except KeyError as error:
        raise CheckpointError(f"{folder / entry.file} lacks tensor {error}, which the manifest "
                              "lists; the checkpoint is foreign") from None
    return TableChunk(table=entry.table, row_start=entry.row_start, col_start=entry.col_start,
                      weights=weights, state=state, present=present, span=entry.rows,
                      extra=extra)
