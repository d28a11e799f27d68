"""What a table is: storages by kind of spec."""

from shardlab.storage.base import LocalShard, PlacedJobs, Storage, StorageOptions, TableChunk
from shardlab.storage.registry import build_storage

__all__ = ["LocalShard", "PlacedJobs", "Storage", "StorageOptions", "TableChunk", "build_storage"]
