"""Why nothing fits: what did not, by how much, and the smallest changes that would help.

Every change that is named was tried: a layout that fits was found for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from shardlab.errors import PlanError
from shardlab.planner.placement import Placement, Problem
from shardlab.planner.request import Request, build_problem
from shardlab.planner.search import leanest
from shardlab.planner.units import format_bytes

_GIB = 2**30
# Numbers of hosts, sizes of memory, and tables that are tried before a kind of change is given up.
_HOST_TRIES = 8
_MEMORY_FACTORS = (1.0, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)
_TABLE_TRIES = 8
_LEANER_OPTIMIZERS = ("row_wise_adagrad", "sgd")


def explain(request: Request, problem: Problem) -> PlanError:
    """The error for a request for which no layout fits."""
    changes = [*_other_sharding(request), *_more_hosts(request, problem),
               *_more_memory(request, problem), *_leaner_optimizer(request),
               *_smaller_batch(request)]
    lines = [*_what(request, problem)]
    if changes:
        lines.append("smallest change, any one of:" if len(changes) > 1 else "smallest change:")
        lines += [f"  - {change}" for change in changes]
    else:
        lines.append("no single change of hosts, memory, sharding, optimizer or batch size was "
                     "found to help: shrink the tables, or change several")
    return PlanError("\n".join(lines))


def _what(request: Request, problem: Problem) -> list[str]:
    """What did not fit, and by how much."""
    topology, capacity = request.topology, problem.capacity
    finest = problem.least(problem.largest_bytes)
    too_large = [table for table in range(problem.num_tables)
                 if problem.largest_bytes[finest[table]] > capacity]
    lines = []
    for table in too_large[:_TABLE_TRIES]:
        option, config = int(finest[table]), request.tables[table]
        cut, size = problem.options.cuts[option], int(problem.largest_bytes[option])
        asked = f", the sharding it asks for ({config.sharding.value})," if config.sharding \
            else ", cut as finely as it can be,"
        shards = problem.options.start[option + 1] - problem.options.start[option]
        lines.append(
            f"table {config.name!r} ({config.num_embeddings} x {config.embedding_dim}) does not "
            f"fit{asked} {cut.sharding.value} over {shards} rank{'s' if shards > 1 else ''} needs "
            f"{format_bytes(size)} on one rank; a rank of {topology.name} holds "
            f"{format_bytes(capacity)}: short by {format_bytes(size - capacity)}")
    lean = problem.least(problem.total_bytes)
    total, room = int(problem.total_bytes[lean].sum()), problem.world_size * capacity
    if total > room:
        lines.append(
            f"the {problem.num_tables} tables need {format_bytes(total)} with optimiser state "
            f"({request.optimizer}) and exchange buffers; the {problem.world_size} ranks of "
            f"{topology.name} hold {format_bytes(room)} ({format_bytes(capacity)} each after the "
            f"reserve): short by {format_bytes(total - room)}")
    return lines or [_no_room(request, problem)]


def _no_room(request: Request, problem: Problem) -> str:
    """Everything fits by its sum, but no layout was found: names the table left over."""
    left = leanest(problem)
    assert isinstance(left, int), "the search would have used this layout"
    name = request.tables[left].name
    size = int(problem.largest_bytes[problem.least(problem.largest_bytes)[left]])
    return (f"table {name!r} found no room: it needs {format_bytes(size)} on one rank, and no "
            f"rank of {request.topology.name} ({format_bytes(problem.capacity)} each) has that "
            "much left beside the other tables, although their sum would fit")


def _works(request: Request) -> bool:
    return isinstance(leanest(build_problem(request)), Placement)


def _other_sharding(request: Request) -> Iterator[str]:
    asking = [index for index, table in enumerate(request.tables) if table.sharding]
    asking.sort(key=lambda index: -request.tables[index].num_embeddings
                * request.tables[index].embedding_dim)
    for index in asking[:_TABLE_TRIES]:
        table = request.tables[index]
        tables = list(request.tables)
        tables[index] = replace(table, sharding=None)
        if table.sharding and _works(replace(request, tables=tuple(tables))):
            yield (f"let the planner choose the sharding of table {table.name!r} (asked: "
                   f"{table.sharding.value})")
            return


def _more_hosts(request: Request, problem: Problem) -> Iterator[str]:
    topology = request.topology
    rows = np.add.reduceat(problem.costs.table_bytes, problem.options.start[:-1])
    needed = float(np.minimum.reduceat(rows, problem.options.first[:-1]).sum())
    start = math.ceil(needed / (problem.capacity * topology.ranks_per_host))
    start = max(topology.hosts + 1, start)
    for hosts in range(start, start + _HOST_TRIES):
        if _works(replace(request, topology=replace(topology, hosts=hosts))):
            yield (f"{hosts} hosts of {topology.ranks_per_host} rank"
                   f"{'s' if topology.ranks_per_host > 1 else ''} instead of {topology.hosts}")
            return


def _more_memory(request: Request, problem: Problem) -> Iterator[str]:
    topology = request.topology
    total = int(problem.total_bytes[problem.least(problem.total_bytes)].sum())
    widest = int(problem.largest_bytes[problem.least(problem.largest_bytes)].max())
    least = max(total / problem.world_size, widest)
    for factor in _MEMORY_FACTORS:
        wanted = (least * factor + request.dense_bytes) / (1 - topology.reserved_fraction)
        hbm_bytes = max(math.ceil(wanted / _GIB * 100) * _GIB // 100, topology.hbm_bytes + 1)
        if _works(replace(request, topology=replace(topology, hbm_bytes=hbm_bytes))):
            yield (f"{format_bytes(hbm_bytes)} of memory per rank instead of "
                   f"{format_bytes(topology.hbm_bytes)}")
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
