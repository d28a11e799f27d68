"""What a cache level is, and its index: names of policies, sizes, tags and states of slots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardlab.cache_layout import CacheLayout
from shardlab.errors import ConfigError

POLICY_CODE = {"lru": 0, "lfu": 1}
ADMISSION_CODE = {"always": 0, "frequency": 1}


@dataclass(frozen=True)
class CacheBlock:
    """A cache level of one shard.

    Attributes:
        rows: rows of the shard; ids are 0..rows-1.
        layout: of the level, from `cache_layout`.
        policy: which row leaves a full set: ``lru`` or ``lfu`` (with decay).
        admission: ``always``, or ``frequency`` (``lfu`` only): a row enters a full set by chance,
            the more rarely the more often the set's weakest row was used.
        seed: of the chances and of ties, non-negative.
    """

    rows: int
    layout: CacheLayout
    policy: str = "lfu"
    admission: str = "always"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICY_CODE or self.admission not in ADMISSION_CODE:
            raise ConfigError(f"cache: policy {self.policy!r} and admission {self.admission!r}; "
                              f"known: {', '.join(POLICY_CODE)}; {', '.join(ADMISSION_CODE)}")
        if self.policy == "lru" and self.admission == "frequency":
            raise ConfigError("cache: admission frequency compares counts of uses, which policy "
                              "lru does not keep; take policy lfu or admission always")


@dataclass(frozen=True)
class CacheIndex:
    """The index of all cache levels of a rank; `cache_place` and the rest change it in place.

    Attributes:
        blocks: the levels.
        meta: uint8 [bytes] on CPU; of every block, for every set, the tags of its slots
            (little-endian, all ones where empty) and then their states. To save it as it is, and
            ``occupied`` with it, is to save everything.
        table: int64 [S, 9] on CPU: (offset in meta, rows, sets, ways, tag bytes, record bytes,
            policy, admission, seed).
        occupied: int64 [S] on CPU; slots of every block that hold a row.
    """

    blocks: tuple[CacheBlock, ...]
    meta: Tensor
    table: Tensor
    occupied: Tensor
