"""Replica groups of the tables, as far as no tensor is needed: which tables can be in several."""

from __future__ import annotations

from shardlab.errors import ConfigError
from shardlab.storage_specs import RowsSpec, StorageSpec, describe_storage


def ranks_of_a_group(world_size: int, replicas: int) -> int:
    """How many of ``world_size`` ranks each of ``replicas`` groups has.

    Raises:
        ConfigError: the ranks do not divide into so many groups.
    """
    if replicas < 1 or world_size % replicas:
        fit = [count for count in range(1, world_size + 1) if world_size % count == 0]
        raise ConfigError(f"parallel.replicas: {world_size} ranks do not divide into {replicas} "
                          f"groups of equal size; choose one of {', '.join(map(str, fit))}")
    return world_size // replicas


def replica_problem(storage: StorageSpec, sync_every_steps: int) -> str:
    """Why copies of a table cannot be kept alike; empty: they can.

    Args:
        storage: of the table.
        sync_every_steps: 1: gradients are merged in every step; N: rows are averaged.
    """
    text = describe_storage(storage)
    if sync_every_steps > 1:
        return "" if isinstance(storage, RowsSpec) else (
            f"{text} has no rows that could be averaged over replicas; set "
            "parallel.sync_every_steps to 1")
    if isinstance(storage, RowsSpec) and len({level.dtype for level in storage.levels}) > 1:
        return (f"{text} rounds rows that leave its cache, and replicas read different rows: their "
                "copies would drift apart; use levels of one dtype, or parallel.sync_every_steps "
                "above 1, which makes copies alike again")
    return ""
