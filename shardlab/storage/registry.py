"""Spec class -> storage class: the only place that knows the kinds."""

from __future__ import annotations

from shardlab.errors import ConfigError
from shardlab.storage.base import LocalShard, Storage, StorageOptions
from shardlab.storage.rows import RowsStorage
from shardlab.storage_specs import RowsSpec, describe_storage

_STORAGES: dict[type, type[Storage]] = {RowsSpec: RowsStorage}


def build_storage(shards: list[LocalShard], options: StorageOptions) -> Storage:
    """Builds the storage that holds these shards.

    Args:
        shards: all of one kind of spec.
        options: what all storages of a rank share.

    Raises:
        ConfigError: a spec that no storage is registered for, or that cannot be held here.
        StorageError: the disk is not writable or too small.
    """
    known = ", ".join(kind.__name__ for kind in _STORAGES)
    for local in shards:
        if type(local.storage) not in _STORAGES:
            raise ConfigError(f"table {local.table.name!r}: storage "
                              f"{describe_storage(local.storage)} can be planned but not trained; "
                              f"kinds that can: {known}")
    kinds = {type(local.storage) for local in shards} or {RowsSpec}
    return _STORAGES[kinds.pop()](shards, options)  # type: ignore[call-arg]
