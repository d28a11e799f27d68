"""A checkpoint at a glance: what its manifest says, without reading a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.manifest import CHANGED


@dataclass(frozen=True)
class Overview:
    """What a manifest says.

    Attributes:
        base: name of the full checkpoint that this one builds on, or None.
        file_bytes: of this folder's files.
        tables: by table: name, collection, rows, columns, storage, pooling, features, and
            ``changed_chunks``, pieces that are stored as changed rows only.
    """

    path: str
    steps: int
    optimizer: str
    world_size: int
    base: str | None
    files: int
    file_bytes: int
    tables: list[dict[str, Any]]


def overview(reader: CheckpointReader) -> Overview:
    """What the manifest of a checkpoint says."""
    manifest = reader.manifest
    tables = []
    for table in manifest.tables:
        changed = sum(chunk.holds == CHANGED and (chunk.collection, chunk.table)
                      == (table.collection, table.name) for chunk in manifest.chunks)
        tables.append({"name": table.name, "collection": table.collection, "rows": table.rows,
                       "columns": table.columns, "storage": table.storage,
                       "pooling": table.pooling, "features": list(table.features),
                       "changed_chunks": changed})
    return Overview(str(reader.path), manifest.steps, manifest.optimizer, manifest.world_size,
                    None if manifest.base is None else manifest.base.name, len(manifest.files),
                    sum(entry.bytes for entry in manifest.files), tables)
