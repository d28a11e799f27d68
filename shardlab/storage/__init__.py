"""What a table is: storages by kind of spec."""

from shardlab.storage.base import (
    KeepsItself,
    LocalShard,
    PlacedJobs,
    RowReads,
    RowWrites,
    Storage,
    StorageChanges,
    StorageOptions,
    StorageSnapshot,
    TableChunk,
    read_codes,
)
from shardlab.storage.kept_room import KeptRoom
from shardlab.storage.mixed import MixedStorage
from shardlab.storage.parts import (
    RowBlock,
    flush_rows,
    kept_parts,
    other_chunks,
    parts_of,
    row_blocks,
)
from shardlab.storage.registry import build_storage
from shardlab.storage.rows import RowsStorage

__all__ = ["KeepsItself", "KeptRoom", "LocalShard", "MixedStorage", "PlacedJobs", "RowBlock",
           "RowReads", "RowWrites", "RowsStorage", "Storage", "StorageChanges", "StorageOptions",
           "StorageSnapshot", "TableChunk", "build_storage", "flush_rows", "kept_parts",
           "other_chunks", "parts_of", "read_codes", "row_blocks"]
