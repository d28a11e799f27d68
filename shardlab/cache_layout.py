"""How many slots a cache level has and what its index costs: arithmetic that needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.errors import ConfigError

#: Ways of a set that the index can hold: an LRU rank has 6 bits.
MAX_WAYS = 64
#: Tags below this fit 2 bytes; the largest 2-byte value marks an empty slot.
_SHORT_TAGS = 2**16 - 1
#: The same for 4 bytes.
_LONG_TAGS = 2**32 - 1
# A tag's hash times the sets fits 63 bits.
_MAX_SETS = 2**31 - 1
_STATE_BYTES = 1
#: Bytes that a processor fetches together. 21 ways of 3 bytes fill one.
CACHE_LINE = 64
_PADDING = 0.025
# 0.1 * 1000 and its like must not gain a slot from the product's rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class CacheLayout:
    """Shape of a set-associative cache over the rows of one shard.

    Row r has the tag t = r // sets and lies in set (r + turn(t)) % sets, where turn is a hash: a
    (set, tag) names one row, and any ``sets`` rows that follow each other share no set.

    Attributes:
        sets: number of sets.
        ways: slots of a set.
        slots: sets * ways; the rows that the level can hold.
        tag_bytes: bytes of a slot's tag, 2 or 4.
        record_bytes: bytes of the index of a set: a tag and one byte of state a slot; in whole
            cache lines where that costs at most 2.5 %.
        metadata_bytes: bytes of the index.
    """

    sets: int
    ways: int
    slots: int
    tag_bytes: int
    record_bytes: int
    metadata_bytes: int


def cache_layout(rows: int, fraction: float, ways: int) -> CacheLayout:
    """The largest cache that takes no more than ``fraction`` of the rows, but at least one slot.

    Under fraction 1 every row has a slot of its own and none ever leaves.

    Args:
        rows: rows of the shard, at least 1.
        fraction: share of the rows that the cache holds, in (0, 1].
        ways: wanted slots of a set, 1 to 64; small caches have fewer.

    Raises:
        ConfigError: an argument out of range, more rows to a set than a tag can tell apart, or
            more sets than the index can number.
    """
    if rows < 1 or not 0 < fraction <= 1 or not 1 <= ways <= MAX_WAYS:
        raise ConfigError(
            f"cache: expected rows >= 1, 0 < fraction <= 1 and 1 <= ways <= {MAX_WAYS}; found "
            f"rows {rows}, fraction {fraction:g}, ways {ways}")
    if fraction == 1:
        sets = -(-rows // ways)
        ways = -(-rows // sets)
    else:
        sets, ways = _fit(max(1, int(fraction * rows * (1 + _ROUNDING))), ways)
    if sets > _MAX_SETS:
        raise ConfigError(f"cache: fraction {fraction:g} of {rows} rows by {ways} ways is {sets} "
                          f"sets, at most {_MAX_SETS}; use more shards, ways or less fraction")
    tags = -(-rows // sets)
    if tags > _LONG_TAGS:
        raise ConfigError(f"cache: {rows} rows over {sets} sets are {tags} rows a set, a tag tells "
                          f"{_LONG_TAGS} apart; raise fraction {fraction:g} or use more shards")
    tag_bytes = 2 if tags <= _SHORT_TAGS else 4
    record = _record_bytes(ways * (tag_bytes + _STATE_BYTES))
    return CacheLayout(sets, ways, sets * ways, tag_bytes, record, sets * record)


def _record_bytes(exact: int) -> int:
    lines = -(-exact // CACHE_LINE) * CACHE_LINE
    return lines if lines <= exact * (1 + _PADDING) else exact


def _fit(slots: int, ways: int) -> tuple[int, int]:
    """(sets, ways) with the most slots of at most this many: full sets, or one set more."""
    full = max(1, slots // ways), min(slots, ways)
    more = -(-slots // ways)
    return max(full, (more, slots // more), key=lambda shape: shape[0] * shape[1])
