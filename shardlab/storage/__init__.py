"""What a table is: storages by kind of spec."""

from shardlab.storage.base import LocalShard, Storage, TableChunk
from shardlab.storage.registry import build_storage

__all__ = ["LocalShard", "Storage", "TableChunk", "build_storage"]
