"""How many different ids a batch holds, under a stated assumption about their skew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Ids are assumed to follow Zipf's law: the i-th most frequent id has probability ~ i^-1.05,
#: the skew of the project's benchmarks.
ZIPF_EXPONENT = 1.05

# The most frequent ids are summed one by one, the others through an integral over log i with
# this many points; together the result is within 1 % of the exact sum.
_HEAD = 32
_POINTS = 128


def unique_ids(rows: Floats, draws: Floats, exponent: float = ZIPF_EXPONENT) -> Floats:
    """Expected number of different ids among ``draws`` independent ids of each table.

    U = sum over i = 1..rows of 1 - (1 - p_i)^draws,  p_i = i^-s / sum of j^-s.

    Args:
        rows: [T] number of ids of each table, at least 1.
        draws: [T] ids drawn, may be fractional.
        exponent: s.

    Returns:
        [T], between 0 and min(rows, draws).

    Source: own (occupancy of independent draws).
    """
    head = np.broadcast_to(np.arange(1.0, _HEAD + 1), (len(rows), _HEAD))
    end = np.maximum(rows + 0.5, _HEAD + 0.5)
    span = np.log(end / (_HEAD + 0.5))[:, None]
    bounds = (_HEAD + 0.5) * np.exp(span * np.linspace(0.0, 1.0, _POINTS + 1))
    ids = np.hstack([head, np.sqrt(bounds[:, 1:] * bounds[:, :-1])])
    width = np.hstack([head <= rows[:, None], np.diff(bounds, axis=1)])
    weight = ids ** -exponent
    share = weight / (weight * width).sum(axis=1, keepdims=True)
    # A table of one row has p_1 = 1, whose logarithm of 1 - p does not exist.
    missed = draws[:, None] * np.log1p(-np.minimum(share, 1 - 1e-12))
    unique: Floats = (-np.expm1(missed) * width).sum(axis=1)
    return np.minimum(unique, np.minimum(rows, draws))
