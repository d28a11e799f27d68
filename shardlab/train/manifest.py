"""The manifest of a checkpoint: which files it has, and which rectangle of which table is where.

It is written last, so a folder without a readable manifest is not a checkpoint. It carries the
checksum of every other file, and of itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardlab.errors import CheckpointError
from shardlab.train.tensor_file import FileEntry, parse_json, verify_size

FORMAT = "shardlab-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TableEntry:
    """One table of one collection (named as in the model), with its whole size."""

    collection: str
    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class ChunkEntry:
    """One stored rectangle of a table: its weights and its optimiser state, by tensor name.

    Of a sparse one only the rows that tensor ``present`` lists are stored; the others are zeros.
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
    extra: tuple[str, ...] = ()
    sparse: bool = False

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ChunkEntry:
        """Reads what `vars` of an entry became in JSON."""
        return ChunkEntry(**{**data, "state": tuple(data["state"]),
                             "extra": tuple(data.get("extra", ()))})

    @property
    def area(self) -> int:
        """Elements of the rectangle."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Manifest:
    """Everything needed to judge and to read a checkpoint."""

    world_size: int
    tables: tuple[TableEntry, ...]
    files: tuple[FileEntry, ...]
    chunks: tuple[ChunkEntry, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with a checksum of its content."""
        content = asdict(self)
        return {"format": FORMAT, "version": VERSION, "crc32": _checksum(content),
                "content": content}

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

        Raises:
            CheckpointError: names the table and both element counts.
        """
        held: dict[tuple[str, str], int] = {}
        for chunk in self.chunks:
            key = (chunk.collection, chunk.table)
            held[key] = held.get(key, 0) + chunk.area
        for table in self.tables:
            found = held.pop((table.collection, table.name), 0)
            if found != table.rows * table.columns:
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
            if have != want:
                problems.append(f"table {want.name!r} is {want.rows} x {want.columns} in the "
                                f"model, {have.rows} x {have.columns} in the checkpoint")
        if problems:
            raise CheckpointError("the checkpoint does not fit the model:\n"
                                  + "\n".join(sorted(problems)))


def read_manifest(folder: Path) -> Manifest:
    """Reads and judges ``manifest.json`` of a checkpoint folder.

    Raises:
        CheckpointError: no such folder, no manifest, foreign JSON or another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a checkpoint folder")
    data = parse_json(path)
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a ShardLab checkpoint")
    if data.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {data.get('version')!r}, this ShardLab reads "
                              f"version {VERSION}")
    content: Any = data.get("content")
    if data.get("crc32") != _checksum(content):
        raise CheckpointError(f"{path} is corrupted: its checksum does not fit its content; load "
                              "another checkpoint")
    try:
        return Manifest(
            world_size=int(content["world_size"]),
            tables=tuple(TableEntry(**table) for table in content["tables"]),
            files=tuple(FileEntry(**entry) for entry in content["files"]),
            chunks=tuple(ChunkEntry.from_dict(chunk) for chunk in content["chunks"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__}: {error}") from None


def _checksum(content: object) -> int:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())
