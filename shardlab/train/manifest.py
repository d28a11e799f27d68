"""The manifest of a checkpoint: which files it has, and which rectangle of which table is where.

It is written last, so a folder without a readable manifest is not a checkpoint. It carries the
checksum of every other file, and of itself. An incremental checkpoint names the full one that it
builds on, with the checksum of that one's manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from shardlab.errors import CheckpointError
from shardlab.train.tensor_file import FileEntry, verify_size

FORMAT = "shardlab-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
#: What the rows of a chunk are: all of its range; those that are there (the others are zeros);
#: those that changed since the full checkpoint below (the others are as they are there).
ALL, PRESENT, CHANGED = "all", "present", "changed"


@dataclass(frozen=True)
class TableEntry:
    """One table of one collection (named as in the model), with its whole size.

    Attributes:
        storage: what held it when it was saved, for people.
        pooling: how bags of it are pooled, for what is exported.
        features: that read it.
    """

    collection: str
    name: str
    rows: int
    columns: int
    storage: str = ""
    pooling: str = "sum"
    features: tuple[str, ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TableEntry:
        """Reads what `asdict` of an entry became in JSON."""
        return TableEntry(**{**data, "features": tuple(data["features"])})


@dataclass(frozen=True)
class ChunkEntry:
    """One stored rectangle of a table: its weights and its optimiser state, by tensor name.

    Attributes:
        rows: of the range from row_start on.
        holds: `ALL`, `PRESENT` or `CHANGED`; but for `ALL`, a tensor ``<key>/rows`` (int64,
            ascending, counted from row_start) says which rows of the range there are.
        extra: names of what only a storage of the same kind takes.
    """

    file: str
    key: str
    collection: str
    table: str
    row_start: int
    col_start: int
    rows: int
    columns: int
    state: tuple[str, ...]
    holds: str = ALL
    extra: tuple[str, ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ChunkEntry:
        """Reads what `vars` of an entry became in JSON."""
        return ChunkEntry(**{**data, "state": tuple(data["state"]), "extra": tuple(data["extra"])})

    @property
    def area(self) -> int:
        """Elements of the rectangle."""
        return self.rows * self.columns

    @property
    def row_end(self) -> int:
        """The row behind the last one."""
        return self.row_start + self.rows


@dataclass(frozen=True)
class BaseEntry:
    """The full checkpoint that an incremental one builds on: a folder beside it, and its digest."""

    name: str
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """Everything needed to judge and to read a checkpoint.

    Attributes:
        optimizer: kind of the rows' optimiser.
        steps: optimiser steps taken.
        base: of an incremental checkpoint.
        xxh3: digest of the content; filled by `to_bytes` and `read_manifest`.
    """

    world_size: int
    tables: tuple[TableEntry, ...]
    files: tuple[FileEntry, ...]
    chunks: tuple[ChunkEntry, ...]
    optimizer: str = ""
    steps: int = 0
    base: BaseEntry | None = None
    xxh3: str = field(default="", compare=False)

    def to_bytes(self) -> bytes:
        """The file: JSON with the digest of its content."""
        content = asdict(self)
        content.pop("xxh3")
        return _text({"format": FORMAT, "version": VERSION, "xxh3": _digest(content),
                      "content": content})

    def file(self, name: str, folder: Path) -> FileEntry:
        """The entry of a file by name.

        Raises:
            CheckpointError: no such file is listed.
        """
        for entry in self.files:
            if entry.name == name:
                return entry
        raise CheckpointError(f"{folder / MANIFEST} does not list {name!r}: the checkpoint is "
                              "incomplete or foreign")

    def check_files(self, folder: Path) -> None:
        """Refuses missing files and files of another size (checksums are read with the file).

        Raises:
            CheckpointError: names the file.
        """
        for entry in self.files:
            verify_size(folder, entry)

    def check_coverage(self) -> None:
        """Refuses chunks that do not hold every element of every table once.

        A table of an incremental checkpoint may instead have changed rows only, or none.

        Raises:
            CheckpointError: names the table and both element counts.
        """
        held: dict[tuple[str, str], int] = {}
        for chunk in self.chunks:
            key = (chunk.collection, chunk.table)
            held[key] = held.get(key, 0) + (0 if chunk.holds == CHANGED else chunk.area)
        for table in self.tables:
            found = held.pop((table.collection, table.name), 0)
            if found != table.rows * table.columns and (found or self.base is None):
                raise CheckpointError(f"table {table.name!r}: {found} of {table.rows} x "
                                      f"{table.columns} elements are stored; the checkpoint is "
                                      "incomplete")
        if held:
            raise CheckpointError(f"chunks of tables that are not listed: {sorted(held)}")

    def check_tables(self, wanted: Sequence[TableEntry]) -> None:
        """Refuses a model whose tables are not the stored ones.

        Raises:
            CheckpointError: lists every table that is missing, extra or of another size.
        """
        stored = {(table.collection, table.name): table for table in self.tables}
        model = {(table.collection, table.name): table for table in wanted}
        problems = [f"table {name!r} of collection {collection!r} is not in the checkpoint"
                    for collection, name in model.keys() - stored.keys()]
        problems += [f"the checkpoint has table {name!r} of collection {collection!r}, which the "
                     "model does not" for collection, name in stored.keys() - model.keys()]
        for key in model.keys() & stored.keys():
            have, want = stored[key], model[key]
            if (have.rows, have.columns) != (want.rows, want.columns):
                problems.append(f"table {want.name!r} is {want.rows} x {want.columns} in the "
                                f"model, {have.rows} x {have.columns} in the checkpoint")
        if problems:
            raise CheckpointError("the checkpoint does not fit the model:\n"
                                  + "\n".join(sorted(problems)))


def read_manifest(folder: Path) -> Manifest:
    """Reads and judges ``manifest.json`` of a checkpoint folder.

    Raises:
        CheckpointError: no such folder, no manifest, foreign JSON, another version, or any byte
            of it changed.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint folder")
    raw, data = _read(path)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a ShardLab checkpoint")
    if data.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {data.get('version')!r}, this ShardLab reads "
                              f"version {VERSION}")
    content: Any = data.get("content")
    if data.get("xxh3") != _digest(content) or raw != _text(data):
        raise CheckpointError(f"{path} is corrupted: its checksum does not fit its content; load "
                              "another checkpoint")
    try:
        base = content["base"]
        return Manifest(
            world_size=int(content["world_size"]),
            tables=tuple(TableEntry.from_dict(table) for table in content["tables"]),
            files=tuple(FileEntry(**entry) for entry in content["files"]),
            chunks=tuple(ChunkEntry.from_dict(chunk) for chunk in content["chunks"]),
            optimizer=content["optimizer"], steps=content["steps"],
            base=None if base is None else BaseEntry(**base), xxh3=data["xxh3"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__}: {error}") from None


def _read(path: Path) -> tuple[bytes, object]:
    try:
        raw = path.read_bytes()
        return raw, json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None


def _text(data: object) -> bytes:
    return json.dumps(data, indent=1).encode()


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64(text.encode()).hexdigest()
