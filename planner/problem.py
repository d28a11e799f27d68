"""From a request to a search problem: options, their costs, and the room for them.

A cost model is what makes a `Problem`; the search knows nothing else of it. This one is the
formulas of `estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.enumerate import Options, enumerate_options
from shardlab.planner.estimate import Pricer
from shardlab.planner.placement import Problem, Ranks
from shardlab.planner.request import Request
from shardlab.planner.workload import build_workload
from shardlab.storage_specs import Tier

Ints = NDArray[np.int64]


class CostModel(Protocol):
    """What prices options, so that one search can plan by several models."""

    def problem(self, tiers: tuple[Tier, ...]) -> Problem:
        """The search problem, tables without a tier on one of these tiers."""

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that the machine has, near to far."""


@dataclass(frozen=True)
class ShardLabModel:
    """The formulas of `estimate` on the topology of a request.

    Attributes:
        request: what is planned.
    """

    request: Request

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that the machine has, near to far."""
        topology = self.request.topology
        sizes = {Tier.HBM: 1, Tier.DDR: topology.ddr_capacity, Tier.SSD: topology.ssd_capacity}
        return tuple(tier for tier, size in sizes.items() if size)

    @cached_property
    def pricer(self) -> Pricer:
        """Prices options of this request."""
        request = self.request
        return Pricer(request, build_workload(
            request.tables, request.topology.world_size, request.batch_size,
            request.settings.statistics))

    def problem(self, tiers: tuple[Tier, ...]) -> Problem:
        """The search problem, tables without a tier on one of these tiers."""
        request, pricer = self.request, self.pricer
        topology = request.topology
        options = enumerate_options(request.tables, topology, tiers)
        options = options.take(_better_exchange(options, pricer))
        ranks = Ranks(topology.world_size, topology.ranks_per_host, topology.ranks_per_host,
                      request.capacity, (topology.ddr_capacity, topology.ssd_capacity))
        allowed = {index: np.array(table.ranks, dtype=np.int64)
                   for index, table in enumerate(request.tables) if table.ranks}
        return Problem(options, pricer.costs(options), ranks, pricer.window_ms, allowed)


def _better_exchange(options: Options, pricer: Pricer) -> Ints:
    """The options of the exchange of less work, of every table and cut.

    Decided by the first storage of each: the others differ in what both exchanges share.
    """
    cut = _runs(options, ("table", "sharding", "row_parts", "col_parts"))
    way = _runs(options, ("table", "sharding", "row_parts", "col_parts", "pooled"))
    leaders = np.flatnonzero(np.append(True, np.diff(way) != 0))
    leading = options.take(leaders)
    costs = pricer.costs(leading)
    first = leading.pieces // leading.row_parts
    piece = costs.busy_ms + costs.fetch_ms
    work = first * piece[:, 0] + (leading.pieces - first) * piece[:, 1] + \
        pricer.speeds.world * costs.common_ms
    of_cut = cut[leaders]
    starts = np.flatnonzero(np.append(True, np.diff(of_cut) != 0))
    least = np.minimum.reduceat(work, starts)[of_cut]
    better = work == least
    # Of equals the first.
    better[1:] &= ~(better[:-1] & (of_cut[1:] == of_cut[:-1]))
    return np.flatnonzero(better[way])


def _runs(options: Options, names: tuple[str, ...]) -> Ints:
    """[O] number of the run of options that are alike in these."""
    new = np.any([np.diff(getattr(options, name)) != 0 for name in names], axis=0)
    return np.cumsum(np.append(False, new))
