"""What the caches of a model's tables did: hits, misses, what was moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel


@dataclass(frozen=True)
class CacheCounts:
    """Counts of one table's nearest cache, of rows that lookups asked for.

    Attributes:
        hits: rows that were there.
        misses: rows that were brought up.
        conflicts: misses that evicted a row or got no slot although slots of other sets are free.
        evictions: rows that left.
        refused: rows that admission kept out.
        staged: rows without a slot, refused ones included.
        moved_bytes: of records that were brought up and written back.
    """

    hits: float = 0
    misses: float = 0
    conflicts: float = 0
    evictions: float = 0
    refused: float = 0
    staged: float = 0
    moved_bytes: float = 0

    def __add__(self, other: CacheCounts) -> CacheCounts:
        return CacheCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def hit_rate(self) -> float:
        """Share of the rows that were there; 0 where none was asked for."""
        return self.hits / max(1, self.hits + self.misses)


#: Numbers of a table's counts.
WIDTH = len(fields(CacheCounts))


class CacheMeter:
    """Counts since the last look, of every table of the plan that has a cache.

    Args:
        model: the sharded model; every rank lists the same tables.
    """

    def __init__(self, model: ShardedModel) -> None:
        self._collections = list(model.collections().values())
        self._mark = self._now()
        self.tables = list(self._mark)

    def _now(self) -> dict[str, list[int]]:
        return {table: counts for collection in self._collections
                for table, counts in collection.cache_counts().items()}

    def restart(self) -> None:
        """Leaves out what was looked up since the last `take`, such as a validation."""
        self._mark = self._now()

    def take(self) -> list[float]:
        """This rank's counts since the last call, table by table, `WIDTH` numbers each."""
        before, self._mark = self._mark, self._now()
        return [float(new - old) for table in self.tables
                for new, old in zip(self._mark[table], before[table], strict=True)]

    def named(self, numbers: list[float]) -> dict[str, CacheCounts]:
        """Numbers as `take` gives them, summed over ranks or not, by table."""
        return {table: CacheCounts(*numbers[i * WIDTH:(i + 1) * WIDTH])
                for i, table in enumerate(self.tables)}


def total_of(caches: Mapping[str, CacheCounts]) -> CacheCounts:
    """All tables together."""
    return sum(caches.values(), CacheCounts())


def as_record(caches: Mapping[str, CacheCounts], steps: int) -> dict[str, Any]:
    """What a line of metrics says: by table, hit rate and means of a step."""
    if not caches:
        return {}
    return {"cache_hit_rate": {name: counts.hit_rate for name, counts in caches.items()},
            **{f"cache_{kind}_per_step": {name: getattr(counts, kind) / steps
                                          for name, counts in caches.items()}
               for kind in ("misses", "conflicts", "evictions", "moved_bytes")}}
