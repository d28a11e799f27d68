"""Where the levels of a table's storage may lie: every chain of tiers that is worth a try.

A level whose tier the user names lies there. Levels without a tier are laid on every tier that
keeps the chain in order, hbm before ddr before ssd. A plain storage of one level without a tier
may besides get caches of its own: rows on ddr or ssd with the share `CACHE_FRACTIONS` of them held
nearer, in the dtype of their home.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from shardlab.storage_specs import (
    Choice,
    LevelSpec,
    RowsSpec,
    StorageRequest,
    StorageSpec,
    Tier,
)

#: Shares of the rows that caches of the planner's own hold, by tier.
CACHE_FRACTIONS: dict[Tier, tuple[float, ...]] = {
    Tier.HBM: (0.01, 0.05, 0.2), Tier.DDR: (0.05, 0.2)}
# Tiers without an order of their own: None of a spec that the user left open.
_ORDER = {tier: position for position, tier in enumerate(Tier)}


@dataclass(frozen=True)
class Variant:
    """A storage with a tier on every level.

    Attributes:
        spec: the storage.
        preference: its place in the user's order of preference, 0 first.
    """

    spec: StorageSpec
    preference: int


def storage_options(request: StorageRequest) -> tuple[StorageSpec, ...]:
    """The storages that the user allows, in the order of preference."""
    return request.options if isinstance(request, Choice) else (request,)


@lru_cache(maxsize=4096)
def storage_variants(request: StorageRequest, tiers: tuple[Tier, ...],
                     behind_link: bool) -> tuple[Variant, ...]:
    """All variants of a storage, the nearest tiers of the most wanted storage first.

    Args:
        request: what the user allows.
        tiers: tiers that open levels may lie on.
        behind_link: ddr is reached over a link, as from a GPU: caches in front of it are worth a
            try, and whatever is computed from, such as cores, stays on hbm.
    """
    found: dict[StorageSpec, Variant] = {}
    for preference, spec in enumerate(storage_options(request)):
        for placed in _placements(spec, tiers, behind_link):
            found.setdefault(placed, Variant(placed, preference))
    return tuple(found.values())


def _placements(spec: StorageSpec, tiers: tuple[Tier, ...],
                behind_link: bool) -> list[StorageSpec]:
    if not isinstance(spec, RowsSpec):
        if spec.tier is not None:
            return [spec]
        usable = (Tier.HBM,) if behind_link else (Tier.HBM, Tier.DDR)
        return [replace(spec, tier=tier) for tier in usable if tier in tiers]
    open_levels = [(level.tier,) if level.tier else tiers for level in spec.levels]
    placed = [_placed(spec, chain) for chain in product(*open_levels) if _is_ordered(chain)]
    if len(spec.levels) == 1 and spec.home.tier is None:
        placed += _with_caches(spec, tiers, behind_link)
    return placed


def _placed(spec: RowsSpec, chain: tuple[Tier, ...]) -> StorageSpec:
    return replace(spec, levels=tuple(replace(level, tier=tier) for level, tier
                                      in zip(spec.levels, chain, strict=True)))


def _is_ordered(chain: tuple[Tier, ...]) -> bool:
    """From near to far, and no cache on a disk."""
    order = [_ORDER[tier] for tier in chain]
    return order == sorted(order) and Tier.SSD not in chain[:-1]


def _with_caches(spec: RowsSpec, tiers: tuple[Tier, ...], behind_link: bool) -> list[StorageSpec]:
    chains: list[tuple[tuple[Tier, float], ...]] = []
    near = [(Tier.HBM, share) for share in CACHE_FRACTIONS[Tier.HBM]]
    middle = [(Tier.DDR, share) for share in CACHE_FRACTIONS[Tier.DDR] if Tier.DDR in tiers]
    if Tier.DDR in tiers and behind_link:
        chains += [(cache, (Tier.DDR, 1.0)) for cache in near]
    if Tier.SSD in tiers:
        chains += [(cache, (Tier.SSD, 1.0)) for cache in (*near, *middle)]
        if behind_link:
            chains += [(first, second, (Tier.SSD, 1.0)) for first in near for second in middle
                       if first[1] < second[1]]
    return [replace(spec, levels=tuple(
        LevelSpec(spec.home.dtype, tier, share) for tier, share in chain)) for chain in chains]
