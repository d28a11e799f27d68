"""``hot_rows``: finds the rows that ids take most often, so that every rank gets a copy of them.

They come from the job's statistics where these record them for a table of so many rows, else from
the first training batches of all ranks. The same job, data and ranks give the same rows, and the
run keeps them in ``plan.json``. What this costs and saves is in docs/exchange.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from shardlab.comm import Groups, broadcast_text, gather_objects_json
from shardlab.config.models import TablesPreset
from shardlab.launch.hot_balance import HotCounts, relieving_rows
from shardlab.plan import ShardingPlan
from shardlab.plan_problems import hot_row_obstacle
from shardlab.planner.statistics import read_statistics
from shardlab.specs import EmbeddingBagConfig

if TYPE_CHECKING:
    from shardlab.config import JobConfig
    from shardlab.launch.readers import JobReader

#: Batches of every rank that are looked at.
BATCHES = 32
#: Rows of a table that a rank tells the others about.
_MOST_ROWS = 1 << 14
Wish = int | str


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        plan: with hot rows.
        lines: the choice in words.
    """

    plan: ShardingPlan
    lines: list[str]


def wishes(job: JobConfig) -> dict[str, Wish]:
    """Tables that a job wants hot rows of."""
    if isinstance(job.tables, TablesPreset):
        wish = job.tables.hot_rows
        return {} if wish is None else {table.name: wish for table in job.table_configs()}
    return {table.name: table.hot_rows for table in job.tables if table.hot_rows is not None}


def choose_hot_rows(job: JobConfig, plan: ShardingPlan, reader: JobReader,
                    groups: Groups) -> Choice:
    """Finds the rows; every rank must call it, and all choose alike.

    Args:
        job: the job.
        plan: where its tables go.
        reader: of the training rows.
        groups: the ranks.

    Raises:
        ConfigError: the job's statistics cannot be read.
    """
    asked, obstacles = wishes(job), {}
    for entry in plan.tables:
        if entry.table in asked and (obstacle := hot_row_obstacle(entry)):
            obstacles[entry.table] = obstacle
    tables = [table for table in job.table_configs()
              if table.name in asked and table.name not in obstacles]
    counts = _recorded(job, tables, groups)
    counts |= _measured([table for table in tables if table.name not in counts], reader, groups)
    free = {name: found for name, found in counts.items() if asked[name] == "auto"}
    chosen = {name: [row for row, _ in counts[name].rows[:wish]]
              for name, wish in asked.items() if isinstance(wish, int) and name in counts}
    chosen |= relieving_rows(free, plan, job.batch_size)
    return Choice(plan.with_hot_rows(chosen), _lines(chosen, counts, obstacles))


def _recorded(job: JobConfig, tables: Sequence[EmbeddingBagConfig],
              groups: Groups) -> dict[str, HotCounts]:
    """What the job's statistics know; rank 0 reads them."""
    if job.statistics is None:
        return {}
    text = None
    if groups.rank == 0:
        found, known = read_statistics(job.statistics), {}
        by_features = {frozenset(record.features): record for record in found.records}
        for table in tables:
            record = by_features.get(frozenset(table.feature_names))
            if record is not None and record.hottest and record.rows == table.num_embeddings:
                known[table.name] = [record.samples, record.ids, record.hottest]
        text = json.dumps(known)
    return {name: HotCounts(samples, ids, tuple((row, count) for row, count in rows))
            for name, (samples, ids, rows) in json.loads(broadcast_text(text, groups)).items()}


def _measured(tables: Sequence[EmbeddingBagConfig], reader: JobReader,
              groups: Groups) -> dict[str, HotCounts]:
    """Counts of the first batches of all ranks."""
    if not tables:
        return {}
    samples, parts = 0, {table.name: [torch.empty(0, dtype=torch.int64)] for table in tables}
    for batch in islice(reader, BATCHES):
        samples += len(batch)
        for table in tables:
            parts[table.name] += [batch.sparse[name].values().long().cpu()
                                  for name in table.feature_names]
    mine: dict[str, object] = {}
    for table in tables:
        ids = torch.cat(parts[table.name])
        rows, counts = torch.unique(
            ids[(ids >= 0) & (ids < table.num_embeddings)], return_counts=True)
        most = counts.argsort(descending=True, stable=True)[:_MOST_ROWS]
        mine[table.name] = [ids.numel(), rows[most].tolist(), counts[most].tolist()]
    return _summed(gather_objects_json([samples, mine], groups))


def _summed(found: Sequence[tuple[int, Mapping[str, tuple[int, list[int], list[int]]]]],
            ) -> dict[str, HotCounts]:
    """The ranks' counts together."""
    samples = sum(mine for mine, _ in found)
    summed = {}
    for name in found[0][1]:
        total: dict[int, int] = {}
        for _, tables in found:
            for row, count in zip(*tables[name][1:], strict=True):
                total[row] = total.get(row, 0) + count
        rows = sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))
        summed[name] = HotCounts(samples, sum(tables[name][0] for _, tables in found),
                                 tuple(rows))
    return summed


def _lines(chosen: Mapping[str, list[int]], counts: Mapping[str, HotCounts],
           obstacles: Mapping[str, str]) -> list[str]:
    lines = [f"hot rows: {sum(map(len, chosen.values())):,} on every rank"]
    lines += [f"  {name}: {len(rows):,}, which {counts[name].share(rows):.0%} of its ids take"
              for name, rows in chosen.items()]
    by_reason: dict[str, list[str]] = {}
    for name, obstacle in obstacles.items():
        by_reason.setdefault(obstacle, []).append(name)
    lines += [f"  none of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: {obstacle}"
              for obstacle, names in by_reason.items()]
    return lines
