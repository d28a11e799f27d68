"""Why nothing fits: what did not, by how much, on which tier, and the smallest changes that would.

Every change that is named was tried: a layout that fits was found for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from shardlab.errors import PlanError
from shardlab.planner.placement import HBM, Placement, Problem
from shardlab.planner.preferences import preferred
from shardlab.planner.problem import ShardLabModel
from shardlab.planner.request import Request
from shardlab.planner.search import find_layout
from shardlab.planner.topology import Topology
from shardlab.planner.units import format_bytes
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage_specs import LevelSpec, RowsSpec, Tier, home_tier
from shardlab.words import counted

_GIB = 2**30
# Doublings of hosts, sizes of memory, and tables that are tried before a change is given up.
_HOST_DOUBLINGS = 6
_MEMORY_FACTORS = (1.0, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 4.0)
_TABLE_TRIES = 8
_LEANER_OPTIMIZERS = ("row_wise_adagrad", "sgd")
_LEANER_DTYPES = ("bf16", "int8")


def explain(request: Request) -> PlanError:
    """The error for a request for which no layout fits."""
    problem = _problem(request)
    changes = [*_fewer_wishes(request), *_more_hosts(request),
               *_more_memory(request, problem), *_leaner_rows(request),
               *_leaner_optimizer(request), *_smaller_batch(request)]
    lines = [*_what(request, problem)]
    if changes:
        lines.append("smallest change, any one of:" if len(changes) > 1 else "smallest change:")
        lines += [f"  - {change}" for change in changes]
    else:
        lines.append("no single change of hosts, memory, sharding, storage, optimizer or batch "
                     "size was found to help: shrink the tables, or change several")
    return PlanError("\n".join(lines))


def _problem(request: Request) -> Problem:
    model = ShardLabModel(request)
    return model.problem(model.tiers)


def _works(request: Request) -> bool:
    left = preferred(_problem(request))
    return left is not None and isinstance(find_layout(left), Placement)


def _what(request: Request, problem: Problem) -> list[str]:
    """What did not fit, and by how much."""
    lines = [_too_large(request, problem, table)
             for table in np.flatnonzero(~np.logical_or.reduceat(
                 problem.fits_alone, problem.options.first[:-1]))[:_TABLE_TRIES].tolist()]
    lines += _too_much(request, problem)
    return lines or [_no_room(request, problem)]


def _too_large(request: Request, problem: Problem, table: int) -> str:
    topology, config = request.topology, request.tables[table]
    options = problem.options.of_table(table)
    option = min(options, key=lambda one: float(problem.fullness[one]))
    cut, shards = problem.options.cut(option), int(problem.options.pieces[option])
    least = "cut as finely as it can be"
    if config.sharding:
        least = "the sharding it asks for" if len(config.allowed_sharding) == 1 \
            else f"the least of those it asks for ({_asked(config)})"
    tier, size, capacity = _worst(problem, option)
    place = f"a rank of {topology.name}" if tier is Tier.HBM else f"a host of {topology.name}"
    where = "one rank" if tier is Tier.HBM else f"one host's {tier.value}"
    return (f"table {config.name!r} ({config.num_embeddings:,} x {config.embedding_dim}) does not "
            f"fit: {cut.sharding.value} over {counted(shards, 'rank')}, {least}, needs "
            f"{format_bytes(size)} on {where}; {place} holds {format_bytes(capacity)}: short by "
            f"{format_bytes(size - capacity)}")


def _asked(config: EmbeddingBagConfig) -> str:
    return " or ".join(kind.value for kind in config.allowed_sharding)


def _worst(problem: Problem, option: int) -> tuple[Tier, int, int]:
    """The tier that an option overfills most: (tier, bytes on one rank or host, capacity)."""
    ranks, size = problem.ranks, problem.costs.piece_bytes[option]
    pieces = math.ceil(int(problem.options.pieces[option]) / ranks.pools)
    found = [(Tier.HBM, int(problem.largest_bytes[option]), ranks.capacity)]
    found += [(tier, pieces * int(size[column]), capacity) for column, (tier, capacity)
              in enumerate(zip((Tier.DDR, Tier.SSD), ranks.pool_capacity, strict=True), 1)]
    return max(found, key=lambda entry: entry[1] / max(entry[2], 1))


def _too_much(request: Request, problem: Problem) -> Iterator[str]:
    """Sums that exceed all memory together, or what there is of one tier."""
    topology = request.topology
    first = problem.options.first[:-1]
    possible = problem.total_bytes.sum(axis=1) < 2**60
    least = np.minimum.reduceat(np.where(possible, problem.total_bytes.sum(axis=1), np.inf), first)
    total, room = float(least.sum()), float(problem.room.sum())
    held = f"{format_bytes(problem.room[HBM])} ({format_bytes(problem.ranks.capacity)} each after "\
           "the reserve)"
    lower = [f"{format_bytes(size)} of {tier.value}" for tier, size
             in zip((Tier.DDR, Tier.SSD), problem.room[1:].tolist(), strict=True) if size]
    held += f" and the hosts {', '.join(lower)}" if lower else ""
    ranks = problem.world_size
    holders = f"the {ranks} ranks of {topology.name} hold" if ranks > 1 \
        else f"the rank of {topology.name} holds"
    if np.isfinite(total) and total > room:
        yield (f"the {problem.num_tables} tables need {format_bytes(total)} with optimiser state "
               f"({request.optimizer}) and exchange buffers; {holders} {held}: short by "
               f"{format_bytes(total - room)}")
        return
    for column, tier in enumerate(Tier):
        needed = float(np.minimum.reduceat(
            np.where(possible, problem.total_bytes[:, column], np.inf), first).sum())
        if np.isfinite(needed) and needed > problem.room[column]:
            yield (f"the tables need {format_bytes(needed)} of {tier.value} wherever they lie; "
                   f"{topology.name} has {format_bytes(problem.room[column])}: short by "
                   f"{format_bytes(needed - problem.room[column])}")


def _no_room(request: Request, problem: Problem) -> str:
    """Everything fits by its sum, but no layout was found: names the table left over."""
    left = find_layout(problem)
    if isinstance(left, Placement):
        return ("the storages that tables allow fit, but not together with the other wishes of "
                "the job")
    name = request.tables[left].name
    size = int(problem.largest_bytes[problem.least(problem.largest_bytes)[left]])
    return (f"table {name!r} found no room: it needs {format_bytes(size)} on one rank, and no "
            f"rank of {request.topology.name} ({format_bytes(problem.ranks.capacity)} each) has "
            "that much left beside the other tables, although their sum would fit")


def _fewer_wishes(request: Request) -> Iterator[str]:
    """One table without the sharding, the ranks or the tier that it asks for."""
    order = sorted(range(len(request.tables)), key=lambda index: (
        -request.tables[index].num_embeddings * request.tables[index].embedding_dim))
    done: set[str] = set()
    for index in order[:_TABLE_TRIES]:
        table = request.tables[index]
        for wish, freed, text in _freed(table):
            if wish not in done and _works(_with_table(request, index, freed)):
                done.add(wish)
                yield text


def _freed(table: EmbeddingBagConfig) -> Iterator[tuple[str, EmbeddingBagConfig, str]]:
    if table.sharding:
        yield ("sharding", replace(table, sharding=None),
               f"let the planner choose the sharding of table {table.name!r} (asked: "
               f"{_asked(table)})")
    if table.ranks:
        yield ("ranks", replace(table, ranks=()),
               f"let table {table.name!r} lie on any rank (asked: {list(table.ranks)})")
    if isinstance(table.storage, RowsSpec) and home_tier(table.storage):
        levels = tuple(replace(level, tier=None) for level in table.storage.levels)
        yield ("tier", replace(table, storage=replace(table.storage, levels=levels)),
               f"let table {table.name!r} lie on any tier (asked: "
               f"{home_tier(table.storage).value})")  # type: ignore[union-attr]


def _with_table(request: Request, index: int, table: EmbeddingBagConfig) -> Request:
    tables = list(request.tables)
    tables[index] = table
    return replace(request, tables=tuple(tables))


def _with_topology(request: Request, topology: Topology) -> Request:
    return replace(request, topology=topology)


def _more_hosts(request: Request) -> Iterator[str]:
    """The fewest hosts that do, found by doubling and halving."""
    topology = request.topology

    def works(hosts: int) -> bool:
        return _works(_with_topology(request, replace(topology, hosts=hosts)))

    low, high = topology.hosts, topology.hosts + 1
    for _ in range(_HOST_DOUBLINGS):
        if works(high):
            break
        low, high = high, 2 * high
    else:
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    yield (f"{counted(high, 'host')} of {counted(topology.ranks_per_host, 'rank')} instead of "
           f"{topology.hosts}")


def _more_memory(request: Request, problem: Problem) -> Iterator[str]:
    topology = request.topology
    total = float(problem.total_bytes[problem.least(problem.total_bytes.sum(axis=1))].sum())
    lower = float(problem.room[1:].sum())
    near = problem.total_bytes[problem.least(problem.total_bytes[:, HBM]), HBM]
    widest = int(problem.largest_bytes[problem.least(problem.largest_bytes)].max())
    least = max(max(total - lower, float(near.sum())) / problem.world_size, widest)
    dense = request.settings.dense.bytes
    for factor in _MEMORY_FACTORS:
        wanted = (least * factor + dense) / (1 - topology.reserved_fraction)
        size = max(math.ceil(wanted / _GIB * 100) * _GIB // 100, topology.hbm_bytes + 1)
        if _works(_with_topology(request, replace(topology, hbm_bytes=size))):
            yield (f"{format_bytes(size)} of memory per rank instead of "
                   f"{format_bytes(topology.hbm_bytes)}")
            break
    lacking = max(total - float(problem.room.sum()), 0.0) / topology.hosts
    for factor in _MEMORY_FACTORS:
        wanted = (topology.ddr_capacity + max(lacking, _GIB) * factor) / (
            1 - topology.reserved_fraction)
        size = math.ceil(wanted / _GIB) * _GIB
        if _works(_with_topology(request, replace(topology, ddr_bytes=size))):
            yield (f"{format_bytes(size)} of ddr per host instead of "
                   f"{format_bytes(topology.ddr_bytes)}")
            return


def _leaner_rows(request: Request) -> Iterator[str]:
    """Narrower rows for every plain fp32 table."""
    for dtype in _LEANER_DTYPES:
        tables = tuple(
            replace(table, storage=RowsSpec((LevelSpec(dtype, table.storage.home.tier),)))
            if isinstance(table.storage, RowsSpec) and len(table.storage.levels) == 1
            and table.storage.home.dtype == "fp32" else table for table in request.tables)
        if tables != request.tables and _works(replace(request, tables=tables)):
            yield f"storage {dtype} instead of fp32"
            return


def _leaner_optimizer(request: Request) -> Iterator[str]:
    for optimizer in _LEANER_OPTIMIZERS:
        if optimizer == request.optimizer:
            continue
        if _works(replace(request, optimizer=optimizer)):
            yield f"optimizer {optimizer} instead of {request.optimizer}"
            return


def _smaller_batch(request: Request) -> Iterator[str]:
    if not _works(replace(request, batch_size=1)):
        return
    batch = request.batch_size // 2
    while batch:
        if _works(replace(request, batch_size=batch)):
            yield f"a batch of {batch} samples per rank instead of {request.batch_size}"
            return
        batch //= 2
