"""Spec class -> storage class: the only place that knows the kinds."""

from __future__ import annotations

from shardlab.errors import ConfigError
from shardlab.storage.base import LocalShard, Storage, StorageOptions
from shardlab.storage.mixed import MixedStorage
from shardlab.storage.pruned import PrunedStorage
from shardlab.storage.rows import RowsStorage
from shardlab.storage.tensor_train import TensorTrainStorage
from shardlab.storage_specs import PrunedSpec, RowsSpec, TensorTrainSpec, describe_storage

_STORAGES: dict[type, type[Storage]] = {RowsSpec: RowsStorage, TensorTrainSpec: TensorTrainStorage,
                                        PrunedSpec: PrunedStorage}


def build_storage(shards: list[LocalShard], options: StorageOptions) -> Storage:
    """Builds the storage that holds these shards; several kinds share one face.

    Args:
        shards: of the rank.
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
    kinds: dict[type, list[int]] = {}
    for block, local in enumerate(shards):
        kinds.setdefault(type(local.storage), []).append(block)
    if len(kinds) <= 1:
        return _STORAGES[next(iter(kinds), RowsSpec)](shards, options)  # type: ignore[call-arg]
    return MixedStorage(shards, {
        _STORAGES[kind]([shards[block] for block in blocks], options): blocks  # type: ignore[call-arg]
        for kind, blocks in kinds.items()})
