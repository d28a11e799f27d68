"""Reads a checkpoint in bounded memory, without a model: full ones, and those that build on one.

An incremental checkpoint holds the rows that changed since its base, a full checkpoint in the same
folder. Readers never see that: a chunk of the base comes with the changed rows laid over it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardlab.errors import CheckpointError, nearest_name
from shardlab.storage import TableChunk
from shardlab.storage.chunk_replay import ChangedShard, is_head
from shardlab.train.manifest import (
    ALL,
    CHANGED,
    MANIFEST,
    ChunkEntry,
    Manifest,
    TableEntry,
    read_manifest,
)
from shardlab.train.state_tree import unflatten_state
from shardlab.train.tensor_file import read_json, read_tensors, verify

#: Files of changed rows that are kept open; chunks come in the order of rows, as these do.
_OPEN_FILES = 3


class CheckpointReader:
    """One checkpoint, judged when it is opened.

    Args:
        path: its folder.

    Attributes:
        path: its folder.
        manifest: its own manifest.
        base: reader of the full checkpoint below it, or None.

    Raises:
        CheckpointError: missing, torn, foreign or damaged, or its base is; names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self.manifest.check_coverage()
        self.manifest.check_files(self.path)
        self.base = self._open_base()
        self._changed: dict[tuple[str, str, int, int], list[ChunkEntry]] = {}
        for entry in self.manifest.chunks:
            if entry.holds == CHANGED:
                self._changed.setdefault(_column_of(entry), []).append(entry)
        stored = {_column_of(entry) for entry in self.base.manifest.chunks} if self.base else set()
        if lost := self._changed.keys() - stored:
            raise CheckpointError(f"{self.path} has changed rows of rectangles that its base does "
                                  f"not have: {sorted(lost)}; the checkpoint is foreign")
        self._open: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._unread = {entry.name for entry in self.manifest.files}

    def _open_base(self) -> CheckpointReader | None:
        entry = self.manifest.base
        if entry is None:
            return None
        folder = self.path.parent / entry.name
        if not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{self.path} holds only what changed since {entry.name}, and "
                                  f"{folder / MANIFEST} is missing; put that folder beside it")
        base = CheckpointReader(folder)
        if base.manifest.xxh3 != entry.xxh3:
            raise CheckpointError(f"{folder / MANIFEST} is not of the checkpoint that {self.path} "
                                  f"builds on: digest {base.manifest.xxh3}, wanted {entry.xxh3}")
        return base

    @property
    def tables(self) -> tuple[TableEntry, ...]:
        """All tables."""
        return self.manifest.tables

    def table(self, name: str) -> TableEntry:
        """A table by name, or ``collection/name`` where two collections have it.

        Raises:
            CheckpointError: unknown or ambiguous; lists the tables.
        """
        found = [entry for entry in self.tables
                 if name in (entry.name, f"{entry.collection}/{entry.name}")]
        if len(found) != 1:
            what = "no table" if not found else "several tables"
            names = [entry.name for entry in self.tables]
            hint = "" if found else nearest_name(name, names)
            raise CheckpointError(f"{self.path} has {what} {name!r}{hint}; it has: "
                                  f"{', '.join(names)}")
        return found[0]

    # ------------------------------------------------------------------ rows
    def chunks(self, wanted: Callable[[ChunkEntry], bool]) -> Iterator[tuple[str, TableChunk]]:
        """Streams (collection, chunk) file by file; a file is verified before it is used.

        Args:
            wanted: which chunks to read; asked once for every rectangle of rows.

        Raises:
            CheckpointError: a file is damaged, or does not hold what the manifest says.
        """
        own = [entry for entry in self.manifest.chunks if entry.holds != CHANGED]
        whole = {(entry.collection, entry.table) for entry in own}
        for entry, tensors in self._read(own, wanted):
            yield entry.collection, _chunk_of(self.path, entry, tensors)
        if self.base is None:
            return
        below = [entry for entry in self.base.manifest.chunks
                 if (entry.collection, entry.table) not in whole]
        for entry, tensors in self.base._read(below, wanted):
            chunk = _chunk_of(self.base.path, entry, tensors)
            if chunk.present is None:
                yield entry.collection, self._lay_over(entry, chunk)
            else:
                for part in self._replay(entry, chunk):
                    yield entry.collection, part

    def table_chunks(self, table: TableEntry, rows: slice | None = None) -> Iterator[TableChunk]:
        """Streams the chunks of one table, or those that touch a range of its rows."""
        low, high = (0, table.rows) if rows is None else (rows.start, rows.stop)
        key = (table.collection, table.name)
        for _, chunk in self.chunks(lambda entry: (entry.collection, entry.table) == key
                                    and entry.row_start < high and low < entry.row_end):
            yield chunk

    def _read(self, entries: list[ChunkEntry], wanted: Callable[[ChunkEntry], bool],
              ) -> Iterator[tuple[ChunkEntry, dict[str, Tensor]]]:
        by_file: dict[str, list[ChunkEntry]] = {}
        for entry in entries:
            if wanted(entry):
                by_file.setdefault(entry.file, []).append(entry)
        for name, inside in by_file.items():
            tensors = self._tensors(name)
            for entry in inside:
                yield entry, tensors

    def _tensors(self, name: str) -> dict[str, Tensor]:
        found = read_tensors(self.path, self.manifest.file(name, self.path))
        self._unread.discard(name)
        return found

    def _lay_over(self, below: ChunkEntry, chunk: TableChunk) -> TableChunk:
        """The same chunk with the rows that changed since the base."""
        for entry in self._above(below):
            above = self._changed_chunk(entry)
            assert above.present is not None
            at = above.present + (entry.row_start - below.row_start)
            inside = (at >= 0) & (at < below.rows)
            chunk.weights[at[inside]] = above.weights[inside]
            for field, value in above.state.items():
                chunk.state[field][at[inside]] = value[inside]
        return chunk

    def _above(self, below: ChunkEntry) -> list[ChunkEntry]:
        """Changed rows that touch a chunk of the base."""
        return [entry for entry in self._changed.get(_column_of(below), [])
                if entry.row_start < below.row_end and below.row_start < entry.row_end]

    def _changed_chunk(self, entry: ChunkEntry) -> TableChunk:
        if entry.file not in self._open:
            self._open[entry.file] = self._tensors(entry.file)
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return _chunk_of(self.path, entry, self._open[entry.file])

    def _replay(self, below: ChunkEntry, chunk: TableChunk) -> Iterator[TableChunk]:
        """A chunk of a pruned table with what changed since the base, in pieces."""
        above = self._above(below)
        heads = [entry for entry in above if is_head(entry.extra)]
        if len(heads) != 1:
            raise CheckpointError(f"{self.path} tells {len(heads)} times what became of rows "
                                  f"{below.row_start} to {below.row_end} of table {below.table!r} "
                                  "since its base; the checkpoint is foreign")
        columns = self.table(f"{below.collection}/{below.table}").columns
        shard = ChangedShard(columns, self._changed_chunk(heads[0]))
        rows = sorted((entry for entry in above if entry is not heads[0]),
                      key=lambda entry: entry.row_start)
        yield from shard.lay_over(chunk, map(self._changed_chunk, rows))

    # ------------------------------------------------------------------ the rest
    def state(self, name: str) -> Any:
        """A state tree: ``shared``, or ``rank-00000`` of every rank of the job that saved it."""
        tree = read_json(self.path, self.manifest.file(f"{name}.json", self.path))
        self._unread.discard(f"{name}.json")
        return unflatten_state(tree, self._tensors(f"{name}.safetensors"))

    def dense(self) -> dict[str, Tensor]:
        """Dense parameters and rank 0's buffers, by the model's names."""
        return self._tensors("dense.safetensors")

    def verify(self) -> None:
        """Judges every file that was not read yet, the base's too.

        Raises:
            CheckpointError: names the first file that is damaged.
        """
        for entry in self.manifest.files:
            if entry.name in self._unread:
                verify(self.path, entry)
        if self.base is not None:
            self.base.verify()

    def verify_states(self) -> None:
        """Judges the files besides those of tables, which ranks read as they need them."""
        tables = {chunk.file for chunk in self.manifest.chunks}
        for entry in self.manifest.files:
            if entry.name in self._unread and entry.name not in tables:
                verify(self.path, entry)


def _column_of(entry: ChunkEntry) -> tuple[str, str, int, int]:
    return entry.collection, entry.table, entry.col_start, entry.columns


def _chunk_of(folder: Path, entry: ChunkEntry, tensors: Mapping[str, Tensor]) -> TableChunk:
    try:
        chunk = TableChunk(
            table=entry.table, row_start=entry.row_start, col_start=entry.col_start,
            weights=tensors[f"{entry.key}/weights"],
            state={field: tensors[f"{entry.key}/{field}"] for field in entry.state},
            extra={field: tensors[f"{entry.key}/extra/{field}"] for field in entry.extra})
        if entry.holds != ALL:
            chunk = replace(chunk, present=tensors[f"{entry.key}/rows"], span=entry.rows)
    except KeyError as error:
        raise CheckpointError(f"{folder / entry.file} lacks tensor {error}, which the manifest "
                              "lists; the checkpoint is foreign") from None
    _check(folder, entry, chunk)
    return chunk


def _check(folder: Path, entry: ChunkEntry, chunk: TableChunk) -> None:
    rows = entry.rows if chunk.present is None else chunk.present.numel()
    if tuple(chunk.weights.shape) != (rows, entry.columns) \
            or any(value.shape[0] != rows for value in chunk.state.values()) \
            or (chunk.present is not None and chunk.present.dtype != torch.int64):
        raise CheckpointError(f"{folder / entry.file}: chunk {entry.key} of table {entry.table!r} "
                              f"is {tuple(chunk.weights.shape)}, the manifest says {rows} x "
                              f"{entry.columns}; the checkpoint is foreign")
