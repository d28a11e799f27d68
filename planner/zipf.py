"""Ids under a stated assumption about their skew: Zipf's law, rows in random order.

Draws are independent. The i-th most frequent id has the share p_i = i^-s / sum of j^-s, and where
it lies among a table's rows is left to chance, as where readers hash values to rows.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Ids are assumed to follow Zipf's law: the i-th most frequent id has probability ~ i^-1.05,
#: the skew of the project's benchmarks.
ZIPF_EXPONENT = 1.05

# The most frequent ids are summed one by one, the others through an integral over log i with
# this many points; together the result is within 1 % of the exact sum.
_HEAD = 32
_POINTS = 128
# Curves of caches are made for tables of 2^(i / 4) rows and read at a cache's share of the rows,
# which moves them by less than 1 %.
_SIZES_PER_OCTAVE = 4
# Points of such a curve, in steps of Che's characteristic time.
_CACHE_POINTS = 96
# Hot ids that are dealt to blocks one by one; the others spread evenly.
_DEALT = 1 << 12
_DEALS = 8


def _quadrature(rows: Floats, exponent: float) -> tuple[Floats, Floats, Floats]:
    """Nodes of sums over ids: ([T, n] id, [T, n] how many it stands for, [T, n] its p)."""
    head = np.broadcast_to(np.arange(1.0, _HEAD + 1), (len(rows), _HEAD))
    end = np.maximum(rows + 0.5, _HEAD + 0.5)
    span = np.log(end / (_HEAD + 0.5))[:, None]
    bounds = (_HEAD + 0.5) * np.exp(span * np.linspace(0.0, 1.0, _POINTS + 1))
    ids = np.hstack([head, np.sqrt(bounds[:, 1:] * bounds[:, :-1])])
    width = np.hstack([head <= rows[:, None], np.diff(bounds, axis=1)])
    weight = ids ** -exponent
    return ids, width, weight / (weight * width).sum(axis=1, keepdims=True)


def unique_ids(rows: Floats, draws: Floats, exponent: float = ZIPF_EXPONENT) -> Floats:
    """Expected number of different ids among ``draws`` independent ids of each table.

    U = sum over i = 1..rows of 1 - (1 - p_i)^draws.

    Args:
        rows: [T] number of ids of each table, at least 1.
        draws: [T] ids drawn, may be fractional.
        exponent: s.

    Returns:
        [T], between 0 and min(rows, draws).

    Source: own (occupancy of independent draws).
    """
    _, width, share = _quadrature(rows, exponent)
    # A table of one row has p_1 = 1, whose logarithm of 1 - p does not exist.
    missed = draws[:, None] * np.log1p(-np.minimum(share, 1 - 1e-12))
    unique: Floats = (-np.expm1(missed) * width).sum(axis=1)
    return np.minimum(unique, np.minimum(rows, draws))


def hot_share(rows: Floats, hottest: Floats, exponent: float = ZIPF_EXPONENT) -> Floats:
    """Share of all draws that take one of the ``hottest`` most frequent ids.

    Args:
        rows: [n] number of ids.
        hottest: [n] how many of them.
        exponent: s, not 1.

    Returns:
        [n], between 0 and 1.

    Source: own (the head's sum and the tail's integral, by the midpoint rule).
    """
    return np.minimum(_power_sum(np.minimum(hottest, rows), exponent)
                      / _power_sum(rows, exponent), 1.0)


def _power_sum(count: Floats, exponent: float) -> Floats:
    """Sum of i^-s over i = 1..count, straight between whole numbers."""
    head = np.concatenate([[0.0], np.cumsum(np.arange(1.0, _HEAD + 1) ** -exponent)])
    near = np.interp(count, np.arange(_HEAD + 1.0), head)
    start, end = _HEAD + 0.5, np.maximum(count + 0.5, _HEAD + 0.5)
    tail = (end ** (1 - exponent) - start ** (1 - exponent)) / (1 - exponent)
    return np.asarray(near + tail)


def lru_miss_ratio(rows: Floats, cache_rows: Floats) -> Floats:
    """Share of draws that a warm LRU cache misses, for `ZIPF_EXPONENT`.

    With T the draws that a row stays without being drawn (Che's approximation),

        cache_rows = sum of 1 - e^(-p_i T),    miss ratio = sum of p_i e^(-p_i T).

    Args:
        rows: [n] number of ids.
        cache_rows: [n] rows of the cache.

    Returns:
        [n], between 0 and 1; 0 where the cache holds every row.

    Source: Che, Tung and Wang, IEEE JSAC 2002.
    """
    size = np.rint(_SIZES_PER_OCTAVE * np.log2(np.maximum(rows, 1.0))).astype(np.int64)
    part = np.clip(cache_rows / rows, 0.0, 1.0)
    out = np.zeros(np.broadcast(rows, cache_rows).shape)
    for one in np.unique(size).tolist():
        chosen = size == one
        out[chosen] = np.interp(part[chosen], *_lru_curve(one))
    return out


@cache
def _lru_curve(size: int) -> tuple[Floats, Floats]:
    """(cached part of the rows, miss ratio) of a table of 2^(size / 4) rows, ascending."""
    rows = 2.0 ** (size / _SIZES_PER_OCTAVE)
    _, width, share = (array[0] for array in _quadrature(np.array([rows]), ZIPF_EXPONENT))
    # From a stay of a fraction of a draw to one at which the rarest row is always there.
    stays = np.geomspace(0.1, 30.0 / share[width > 0].min(), _CACHE_POINTS)[:, None]
    gone = np.exp(-share * stays)
    part = ((1 - gone) * width).sum(axis=1) / width.sum()
    missed = (share * gone * width).sum(axis=1)
    return np.concatenate([[0.0], part, [1.0]]), np.concatenate([[1.0], missed, [0.0]])


def fullest_block(rows: Floats, parts: Ints) -> Floats:
    """Share of all draws that fall into the fullest of ``parts`` equal blocks of rows.

    The hottest ids are dealt to the blocks by chance; the mean of a few deals.

    Args:
        rows: [n] number of ids.
        parts: [n] blocks.

    Returns:
        [n], between 1 / parts and 1.

    Source: own.
    """
    size = np.rint(_SIZES_PER_OCTAVE * np.log2(np.maximum(rows, 1.0))).astype(np.int64)
    pairs, where = np.unique(np.stack([size, parts]), axis=1, return_inverse=True)
    found = np.array([_dealt_share(*pair) for pair in pairs.T.tolist()])
    return np.asarray(np.maximum(found[where.reshape(-1)], 1.0 / parts))


@cache
def _dealt_share(size: int, parts: int) -> float:
    rows = max(round(2.0 ** (size / _SIZES_PER_OCTAVE)), 1)
    whole = float(_power_sum(np.array([float(rows)]), ZIPF_EXPONENT)[0])
    fullest, dealt = _dealt_weight(min(rows, _DEALT), parts)
    return fullest / whole + max(0.0, 1.0 - dealt / whole) / parts


@cache
def _dealt_weight(dealt: int, parts: int) -> tuple[float, float]:
    """Weight of the fullest block of ids 1 to ``dealt``, and of all of them."""
    weight = np.arange(1.0, dealt + 1) ** -ZIPF_EXPONENT
    rng = np.random.default_rng(parts)
    fullest = [np.bincount(rng.permutation(dealt) * parts // dealt, weight, parts).max()
               for _ in range(_DEALS)]
    return float(np.mean(fullest)), float(weight.sum())
