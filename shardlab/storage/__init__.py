"""What a table is: storages by kind of spec."""

from shardlab.storage.base import (
    LocalShard,
    PlacedJobs,
    RowReads,
    RowWrites,
    Storage,
    StorageOptions,
    TableChunk,
    read_codes,
)
from shardlab.storage.registry import build_storage

__all__ = ["LocalShard", "PlacedJobs", "RowReads", "RowWrites", "Storage", "StorageOptions",
           "TableChunk", "build_storage", "read_codes"]
