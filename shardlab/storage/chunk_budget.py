"""Who keeps how many chunks: thresholds of utility from histograms, without sorting anything.

A rank describes its chunks by a curve: bytes of the chunks whose utility is at least x,
at the edges of `bin_edges`. Curves add up, so that one small all-reduce tells every rank the same
threshold. Between edges (a fifth apart) utilities are taken as evenly spread.

Source: own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardlab.ops.chunk_numbers import BINS, bin_edges

Numbers = NDArray[np.float64]
_EDGES: Numbers = bin_edges().numpy()


def common_unit(units: Tensor) -> float:
    """The geometric mean of units; those that are 0 are not known."""
    known = units[units > 0].double()
    return float(known.log().mean().exp()) if known.numel() else 0.0


def at_least(counts: Tensor, limits: Tensor) -> Tensor:
    """Chunks whose utility is at least some limits.

    Args:
        counts: [T, BINS].
        limits: fp64 [T, n].

    Returns:
        fp64 [T, n].
    """
    edges, some = bin_edges(), counts.double()
    place = (torch.searchsorted(edges, limits.contiguous(), right=True) - 1).clamp(0, BINS - 1)
    above = torch.cat([some.flip(1).cumsum(1).flip(1), torch.zeros_like(some[:, :1])], 1)
    share = ((limits - edges[place]) / (edges[place + 1] - edges[place])).clamp(0, 1)
    return above.gather(1, place + 1) + (1 - share) * some.gather(1, place)


def demand_curve(counts: Tensor, cost: float) -> Tensor:
    """Bytes of the chunks whose utility reaches the edges of the bins.

    Args:
        counts: [BINS] of this rank.
        cost: bytes of a chunk.

    Returns:
        fp64 [BINS + 1].
    """
    return at_least(counts[None], bin_edges()[None])[0] * cost


def common_threshold(curves: Tensor, limits: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """Thresholds that keep ``total`` bytes, and no more on a rank than its limit.

    Args:
        curves: fp64 [W, BINS + 1], of `demand_curve`.
        limits: fp64 [W] bytes.
        total: bytes of all ranks together.

    Returns:
        fp64 [W]: one threshold for all, higher where a rank's limit binds; 0: nothing need go.
        fp64 [W]: bytes that every rank keeps.
    """
    points, most = curves.numpy(), limits.numpy()

    def kept(threshold: float) -> float:
        return float(np.minimum(_bytes_at(points, threshold), most).sum())

    common = _highest(lambda x: kept(x) >= total) if kept(0.0) > total else 0.0
    at_common = _bytes_at(points, common)
    own = np.full_like(most, common)
    for rank in (at_common > most).nonzero()[0]:
        own[rank] = _highest(partial(_reaches, points[rank:rank + 1], float(most[rank])))
    return torch.from_numpy(own), torch.from_numpy(np.minimum(at_common, most))


def _reaches(curve: Numbers, limit: float, threshold: float) -> bool:
    """Whether a rank keeps as much as its limit; curve is [1, BINS + 1]."""
    return float(_bytes_at(curve, threshold)[0]) >= limit


def _bytes_at(curves: Numbers, threshold: float) -> Numbers:
    """[W]: curves between their points."""
    place = min(max(int(np.searchsorted(_EDGES, threshold, side="right")) - 1, 0), BINS - 1)
    share = (threshold - _EDGES[place]) / (_EDGES[place + 1] - _EDGES[place])
    found: Numbers = curves[:, place] + min(share, 1.0) * (curves[:, place + 1] - curves[:, place])
    return found


def _highest(holds: Callable[[float], bool]) -> float:
    """The highest threshold at which a falling condition still holds, by halving."""
    low, high = 0, BINS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(float(_EDGES[middle])) else (low, middle)
    below, above = float(_EDGES[low]), float(_EDGES[high])
    while below < (halfway := (below + above) / 2) < above:
        below, above = (halfway, above) if holds(halfway) else (below, halfway)
    return below
