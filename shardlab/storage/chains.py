"""Builds the levels of shards: which share a cache and a home, and what the kernels work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shardlab.cache_layout import CacheLayout, cache_layout
from shardlab.errors import ConfigError
from shardlab.ops.cache_index import CacheBlock
from shardlab.storage.arena import Arena, BlockSpec, build_arena
from shardlab.storage.base import LocalShard, StorageOptions
from shardlab.storage.cache_level import CacheLevel
from shardlab.storage.disk_home import DiskHome
from shardlab.storage.levels import Clock, Home, Level, MemoryHome
from shardlab.storage.shared_home import SharedHome
from shardlab.storage_specs import LevelSpec, Tier, describe_storage
from shardlab.tiers import Disk

#: Staging rows that a cache on a device has room for; on the CPU, room costs nothing until used.
_DEVICE_STAGING = 1 << 18


@dataclass(frozen=True)
class Chains:
    """All levels of a rank's shards.

    Attributes:
        near: what the kernels read and step: homes of one level, and slots of caches.
        caches: the cache next to the kernels of every group of shards with the same levels.
        below: the caches between those and the homes.
        homes: (home, number in it) of every shard.
        disk_homes: those of them that lie on disk.
    """

    near: Arena
    caches: list[CacheLevel]
    below: list[CacheLevel]
    homes: list[tuple[Home, int]]
    disk_homes: list[DiskHome]


def build_chains(shards: Sequence[LocalShard], options: StorageOptions, clock: Clock) -> Chains:
    """Builds the levels of shards of the ``rows`` storage.

    Raises:
        ConfigError: a home on disk without a cache above it, or no folder for one.
        StorageError: the disk is not writable or too small.
    """
    for local in shards:
        _check(local, options)
    near = build_arena([_near_spec(local, options) for local in shards], options.optimizer,
                       options.device)
    homes: list[tuple[Home, int] | None] = [None] * len(shards)
    groups: dict[tuple[Tier | None, ...], list[int]] = {}
    for block, local in enumerate(shards):
        levels = _levels(local)
        if len(levels) == 1:
            homes[block] = MemoryHome(near, [block], clock), 0
        else:
            groups.setdefault(tuple(level.tier for level in levels), []).append(block)
    caches, below, disk_homes = [], [], []
    for tiers, blocks in groups.items():
        group = [shards[block] for block in blocks]
        home: Home
        if tiers[-1] is Tier.SSD:
            assert options.ssd_dir is not None
            disk_homes.append(_disk_home(group, options, clock))
            home = SharedHome(disk_homes[-1])
        else:
            home = MemoryHome(build_arena([_home_spec(local) for local in group],
                                          options.optimizer, _device(tiers[-1], options)),
                              list(range(len(group))), clock)
        level: Level = home
        for depth in range(len(tiers) - 2, 0, -1):
            arena = build_arena([_cache_spec(local, depth, options) for local in group],
                                options.optimizer, _device(tiers[depth], options))
            middle = _cache(group, depth, (arena, list(range(len(group)))), level, clock)
            below.append(middle)
            level = middle
        caches.append(_cache(group, 0, (near, blocks), level, clock))
        for number, block in enumerate(blocks):
            homes[block] = home, number
    assert all(home is not None for home in homes)
    return Chains(near, caches, below, homes, disk_homes)  # type: ignore[arg-type]


def _levels(local: LocalShard) -> tuple[LevelSpec, ...]:
    return local.chain.levels


def _device(tier: Tier | None, options: StorageOptions) -> torch.device:
    return torch.device("cpu") if tier is Tier.DDR else options.device


def _check(local: LocalShard, options: StorageOptions) -> None:
    levels, where = _levels(local), f"table {local.table.name!r}"
    if levels[0].tier is Tier.DDR and options.device.type == "cuda":
        raise ConfigError(
            f"{where}: storage {describe_storage(local.storage)} needs a level on hbm, from which "
            "the device reads, such as levels: [{tier: hbm, fraction: 0.05}, {tier: ddr}]")
    if levels[-1].tier is not Tier.SSD:
        return
    if len(levels) == 1:
        raise ConfigError(
            f"{where}: storage {describe_storage(local.storage)} needs a cache in memory above the "
            "disk, such as levels: [{tier: ddr, fraction: 0.1}, {tier: ssd}]")
    if options.ssd_dir is None:
        raise ConfigError(f"{where}: storage {describe_storage(local.storage)} needs a folder on "
                          "the disk: set train.ssd_dir, or give ssd_dir to shard()")


def cache_shape(local: LocalShard, depth: int) -> CacheLayout:
    """Slots of a cache level of a shard."""
    level = _levels(local)[depth]
    return cache_layout(local.shard.rows, level.fraction, level.ways)


def _near_spec(local: LocalShard, options: StorageOptions) -> BlockSpec:
    if len(_levels(local)) == 1:
        return _home_spec(local)
    return _cache_spec(local, 0, options)


def _home_spec(local: LocalShard) -> BlockSpec:
    return BlockSpec(local, _levels(local)[-1], local.shard.rows)


def _cache_spec(local: LocalShard, depth: int, options: StorageOptions) -> BlockSpec:
    slots = cache_shape(local, depth).slots
    spare = local.shard.rows if options.device.type == "cpu" else \
        min(local.shard.rows, _DEVICE_STAGING)
    return BlockSpec(local, _levels(local)[depth], slots, spare)


def _disk_home(group: list[LocalShard], options: StorageOptions, clock: Clock) -> DiskHome:
    assert options.ssd_dir is not None
    folder = Path(options.ssd_dir)
    return DiskHome([_home_spec(local) for local in group], options.optimizer, folder, clock,
                    Disk())


def _cache(group: list[LocalShard], depth: int, place: tuple[Arena, list[int]], below: Level,
           clock: Clock) -> CacheLevel:
    arena, numbers = place
    caches = []
    for local in group:
        level = _levels(local)[depth]
        caches.append(CacheBlock(local.shard.rows, cache_shape(local, depth), level.policy,
                                 level.admission, clock.seed))
    starts = torch.tensor([local.shard.row_start for local in group])
    return CacheLevel(arena, numbers, caches, starts, below, clock, depth)
