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
from shardlab.storage.mixed import MixedStorage
from shardlab.storage.parts import RowBlock, flush_rows, other_chunks, parts_of, row_blocks
from shardlab.storage.registry import build_storage
from shardlab.storage.rows import RowsStorage

__all__ = ["LocalShard", "MixedStorage", "PlacedJobs", "RowBlock", "RowReads", "RowWrites",
           "RowsStorage", "Storage", "StorageOptions", "TableChunk", "build_storage", "flush_rows",
           "other_chunks", "parts_of", "read_codes", "row_blocks"]
