"""A sharding plan as data: which rectangle of which table lies on which rank, and how.

A shard is a rectangle, rows [row_start, row_end) x columns [col_start, col_end), on one rank.
Every sharding type is only another set of rectangles; `build_table_plan` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from shardlab.errors import PlanError
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType, Tier

SCHEMA_VERSION = 1
#: Top-level fields that the planner adds for readers and that a run ignores.
ANNOTATIONS = ("predicted",)


@dataclass(frozen=True)
class Shard:
    """One rectangle of a table on one rank, with the tier of its home level."""

    rank: int
    row_start: int
    row_end: int
    col_start: int
    col_end: int
    tier: Tier = Tier.HBM

    @property
    def rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def columns(self) -> int:
        return self.col_end - self.col_start


@dataclass(frozen=True)
class TablePlan:
    """Where one table goes. A ``data_parallel`` table has one whole-table shard per rank."""

    table: str
    sharding: ShardingType
    exchange: ExchangeKind
    shards: tuple[Shard, ...]

    @property
    def replicated(self) -> bool:
        return self.sharding is ShardingType.DATA_PARALLEL


@dataclass(frozen=True)
class ShardingPlan:
    """The placement of all tables over ``world_size`` ranks."""

    world_size: int
    tables: tuple[TablePlan, ...]
    version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """JSON text with a schema version; `from_json` reads it back to an equal plan."""
        return json.dumps(asdict(self), indent=1, default=str)

    @staticmethod
    def from_json(text: str) -> ShardingPlan:
        """Reads a plan.

        Raises:
            PlanError: not JSON, another schema version, or a missing or unknown field.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"plan is not JSON: {error}") from None
        found = data.get("version") if isinstance(data, dict) else None
        if found != SCHEMA_VERSION:
            raise PlanError(f"plan has schema version {found!r}, this ShardLab reads "
                            f"{SCHEMA_VERSION}; write it again with this version")
        unknown = sorted(data.keys() - {"world_size", "tables", "version", *ANNOTATIONS})
        if unknown:
            raise PlanError(f"plan has unknown fields {unknown}; a plan holds world_size, tables "
                            "and version")
        try:
            return ShardingPlan(int(data["world_size"]),
                                tuple(_table_from(entry) for entry in data["tables"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"plan is malformed: {type(error).__name__}: {error}") from None

    def check(self, tables: Sequence[EmbeddingBagConfig], world_size: int) -> None:
        """Refuses a plan that does not cover exactly these tables on this world size.

        Raises:
            PlanError: lists every mismatch by table name.
        """
        problems = []
        if self.world_size != world_size:
            problems.append(f"plan is for {self.world_size} ranks, this job runs {world_size}; "
                            "plan again for this world size")
        planned = {entry.table: entry for entry in self.tables}
        if len(planned) != len(self.tables):
            problems.append("plan names a table twice")
        wanted = {table.name: table for table in tables}
        problems += [f"table {name!r} is not in the plan" for name in wanted if name not in planned]
        problems += [f"plan names table {name!r}, which the model does not have"
                     for name in planned if name not in wanted]
        for name in planned.keys() & wanted.keys():
            problems += _cover_problems(planned[name], wanted[name], self.world_size)
        if problems:
            raise PlanError("\n".join(sorted(problems)))


def _table_from(entry: dict[str, Any]) -> TablePlan:
    shards = tuple(Shard(**{**shard, "tier": Tier(shard["tier"])}) for shard in entry["shards"])
    return TablePlan(**{**entry, "sharding": ShardingType(entry["sharding"]),
                        "exchange": ExchangeKind(entry["exchange"]), "shards": shards})


def _cover_problems(plan: TablePlan, table: EmbeddingBagConfig, world: int) -> list[str]:
    """Every cell of the table exactly once (once per rank when replicated)."""
    where, rows, columns = f"table {table.name!r}", table.num_embeddings, table.embedding_dim
    problems = []
    for shard in plan.shards:
        inside = 0 <= shard.row_start < shard.row_end <= rows and \
            0 <= shard.col_start < shard.col_end <= columns
        if not inside or not 0 <= shard.rank < world:
            problems.append(f"{where}: shard {shard} lies outside {rows} x {columns} "
                            f"on {world} ranks")
    if problems:
        return problems
    if plan.replicated:
        whole = all((s.rows, s.columns) == (rows, columns) for s in plan.shards)
        if not whole or sorted(s.rank for s in plan.shards) != list(range(world)):
            return [f"{where}: data_parallel needs one whole copy on each of {world} ranks"]
        return []
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for shard in plan.shards:
        spans.setdefault((shard.row_start, shard.row_end), []).append(
            (shard.col_start, shard.col_end))
    if not _tiles(sorted(spans), rows) or \
            not all(_tiles(sorted(span), columns) for span in spans.values()):
        return [f"{where}: shards do not tile {rows} rows x {columns} columns exactly once"]
    return []


def _tiles(spans: list[tuple[int, int]], size: int) -> bool:
    ends = [0, *(end for _, end in spans)]
    return bool(spans) and ends[-1] == size and \
        all(start == end for (start, _), end in zip(spans, ends, strict=False))


def even_splits(size: int, parts: int) -> list[tuple[int, int]]:
    """[start, end) of up to ``parts`` nearly equal, non-empty pieces of range(size)."""
    parts = max(1, min(parts, size))
    bounds = [size * i // parts for i in range(parts + 1)]
    return list(pairwise(bounds))


def build_table_plan(table: EmbeddingBagConfig, sharding: ShardingType, ranks: Sequence[int], *,
                     columns: int = 1, exchange: ExchangeKind | None = None,
                     tier: Tier | None = None) -> TablePlan:
    """Lays one table over ranks.

    Args:
        table: the table.
        sharding: how to cut it.
        ranks: ``table_wise``: one rank. ``row_wise`` / ``table_row_wise``: one row block each
            (the ranks of one host for the latter). ``column_wise`` / ``table_column_wise``: one
            column block each. ``grid_shard``: ``columns`` consecutive groups of ranks, each
            group holding one column block cut by rows. ``data_parallel``: every rank.
        columns: column blocks of a ``grid_shard``.
        exchange: what crosses the wire; None takes the table's own choice.
        tier: tier of the home level; None takes the storage's own choice, else hbm.

    Raises:
        PlanError: more column blocks than columns, or ranks that do not divide into groups.
    """
    rows, dim = table.num_embeddings, table.embedding_dim
    ranks = list(ranks)
    where = f"table {table.name!r}, {sharding.value}"
    home = tier or table.storage.home.tier or Tier.HBM
    if not ranks or (sharding is ShardingType.TABLE_WISE and len(ranks) != 1):
        raise PlanError(f"{where}: wrong number of ranks: {ranks}")
    by_row = {ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE}
    by_column = {ShardingType.COLUMN_WISE, ShardingType.TABLE_COLUMN_WISE}
    if sharding in by_row:
        groups = [ranks]
    elif sharding in by_column:
        groups = [[rank] for rank in ranks]
    elif sharding is ShardingType.GRID_SHARD:
        if columns < 1 or len(ranks) % columns:
            raise PlanError(f"{where}: {len(ranks)} ranks do not divide into {columns} groups")
        size = len(ranks) // columns
        groups = [ranks[i:i + size] for i in range(0, len(ranks), size)]
    else:
        groups = [[rank] for rank in ranks]
    if sharding is ShardingType.DATA_PARALLEL:
        shards = [Shard(rank, 0, rows, 0, dim, home) for rank in ranks]
    else:
        if len(groups) > dim:
            raise PlanError(f"{where}: {len(groups)} column blocks asked, "
                            f"the table has {dim} columns")
        spans = even_splits(dim, len(groups))
        shards = [Shard(rank, *block, *span, home)
                  for group, span in zip(groups, spans, strict=True)
                  for rank, block in zip(group, even_splits(rows, len(group)), strict=False)]
    return TablePlan(table.name, sharding, exchange or table.exchange, tuple(shards))
