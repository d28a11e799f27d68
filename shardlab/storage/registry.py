"""Spec class -> storage class: the only place that knows the kinds."""

from __future__ import annotations

import torch

from shardlab.errors import ConfigError
from shardlab.specs import RowsSpec
from shardlab.storage.base import LocalShard, Storage
from shardlab.storage.rows import RowsStorage

_STORAGES: dict[type, type[Storage]] = {RowsSpec: RowsStorage}


def build_storage(shards: list[LocalShard], optimizer: str, seed: int,
                  device: torch.device) -> Storage:
    """Builds the storage that holds these shards.

    Args:
        shards: all of one kind of spec.
        optimizer: kind of row optimiser, which decides the state's bytes.
        seed: of the initial weights.
        device: where the rows are read to and updated from.

    Raises:
        ConfigError: a spec that no storage is registered for.
    """
    kinds = {type(local.table.storage) for local in shards} or {RowsSpec}
    if len(kinds) > 1 or not kinds <= _STORAGES.keys():
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        known = ", ".join(kind.__name__ for kind in _STORAGES)
        raise ConfigError(f"no single storage holds specs {names}; known: {known}")
    return _STORAGES[kinds.pop()](shards, optimizer, seed, device)  # type: ignore[call-arg]
