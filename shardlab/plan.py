"""A sharding plan as data: which rectangle of which table lies on which rank, and how.

A shard is a rectangle, rows [row_start, row_end) x columns [col_start, col_end), on one rank.
Every sharding type is only another set of rectangles; `build_table_plan` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from shardlab.errors import ConfigError, PlanError, nearest_name
from shardlab.replication import replica_problem
from shardlab.row_sets import rows_from_text, rows_to_text
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import (
    DTYPES,
    ROUNDINGS,
    Choice,
    LevelSpec,
    RowsSpec,
    StorageSpec,
    Tier,
    cut_units,
    describe_storage,
    place_home,
    resolve_storage,
)
from shardlab.storage_text import parse_storage, storage_to_data

SCHEMA_VERSION = 2
#: Top-level fields that the planner adds for readers and that a run ignores.
ANNOTATIONS = ("predicted",)
_GROUPS = ("replicas", "sync_every_steps")


@dataclass(frozen=True)
class Shard:
    """One rectangle of a table on one rank.

    Attributes:
        bytes: predicted by the planner, optimiser state included; zero where nobody predicted.
        ms: predicted milliseconds of a step on its rank.
    """

    rank: int
    row_start: int
    row_end: int
    col_start: int
    col_end: int
    bytes: TierBytes = field(default_factory=TierBytes)
    ms: float = 0.0

    @property
    def rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def columns(self) -> int:
        return self.col_end - self.col_start


@dataclass(frozen=True)
class WireDtypes:
    """How a table's rows and gradients travel.

    Attributes:
        forward: codec of rows, a key of `storage_specs.DTYPES`.
        backward: codec of gradients.
        rounding: of gradients, ``stochastic`` or ``nearest``; rows are rounded to nearest.
        error_feedback: every rank keeps what rounding took from its gradients, 4 bytes an element
            of the table, and adds it to the row's next gradient; for unique rows only.
    """

    forward: str = "fp32"
    backward: str = "fp32"
    rounding: str = "stochastic"
    error_feedback: bool = False


@dataclass(frozen=True)
class DenseWire:
    """How gradients of the dense part travel.

    Attributes:
        codec: a key of `storage_specs.DTYPES`; ``fp32``: as they are.
        rounding: ``stochastic`` or ``nearest``.
    """

    codec: str = "fp32"
    rounding: str = "stochastic"


@dataclass(frozen=True)
class TablePlan:
    """Where one table goes. A ``data_parallel`` table has one whole-table shard per rank.

    Attributes:
        storage: how every shard is held; every level names its tier.
        hot_rows: ascending; of these every rank holds a copy besides, and reads that one.
    """

    table: str
    sharding: ShardingType
    exchange: ExchangeKind
    shards: tuple[Shard, ...]
    storage: StorageSpec = field(default_factory=lambda: RowsSpec((LevelSpec(tier=Tier.HBM),)))
    wire: WireDtypes = field(default_factory=WireDtypes)
    hot_rows: tuple[int, ...] = ()

    @property
    def replicated(self) -> bool:
        return self.sharding is ShardingType.DATA_PARALLEL


@dataclass(frozen=True)
class ShardingPlan:
    """The placement of all tables over ``world_size`` ranks, or over each of several groups of so
    many.

    Attributes:
        world_size: ranks of a group, which numbers its ranks from 0; without groups, of the job.
        tables: where they go.
        replicas: groups that hold all tables, each placed alike; ranks of a group follow each
            other in the job.
        sync_every_steps: 1: groups merge the gradients of every step, and train as one; N: every N
            steps, rows that they have changed become the mean over the groups.
        dense_wire: of the gradients of what is no table.
    """

    world_size: int
    tables: tuple[TablePlan, ...]
    version: int = SCHEMA_VERSION
    replicas: int = 1
    sync_every_steps: int = 1
    dense_wire: DenseWire = field(default_factory=DenseWire)

    @property
    def job_ranks(self) -> int:
        """Ranks of a job that executes this plan."""
        return self.world_size * self.replicas

    def with_replicas(self, replicas: int, sync_every_steps: int = 1) -> ShardingPlan:
        """The same placement in each of so many groups of ranks.

        Raises:
            PlanError: a number below 1.
        """
        for name, value in (("replicas", replicas), ("sync_every_steps", sync_every_steps)):
            if value < 1:
                raise PlanError(f"{name}: must be at least 1, found {value}")
        return replace(self, replicas=replicas, sync_every_steps=sync_every_steps)

    def to_json(self, predicted: Mapping[str, Any] | None = None) -> str:
        """JSON text with a schema version; `from_json` reads it back to an equal plan.

        Args:
            predicted: plain data that goes beside the plan, for readers.
        """
        tables = [{**asdict(entry), "storage": storage_to_data(entry.storage),
                   "hot_rows": rows_to_text(entry.hot_rows)} for entry in self.tables]
        beside = {} if predicted is None else {"predicted": predicted}
        return json.dumps({**asdict(self), "tables": tables, **beside}, indent=1, default=str)

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
        unknown = sorted(data.keys() - {"world_size", "tables", "version", "dense_wire", *_GROUPS,
                                        *ANNOTATIONS})
        if unknown:
            raise PlanError(f"plan has unknown fields {unknown}; a plan holds world_size, tables, "
                            "version, replicas, sync_every_steps and dense_wire")
        try:
            return ShardingPlan(
                int(data["world_size"]), tuple(_table_from(entry) for entry in data["tables"]),
                dense_wire=DenseWire(**data.get("dense_wire", {}))
            ).with_replicas(*(int(data.get(name, 1)) for name in _GROUPS))
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise PlanError(f"plan is malformed: {type(error).__name__}: {error}") from None

    def with_wire(self, wire: WireDtypes,
                  tables: Mapping[str, WireDtypes] | None = None) -> ShardingPlan:
        """The same placement with other codecs on the wire.

        Args:
            wire: of every table that ``tables`` does not name.
            tables: by table.

        Raises:
            PlanError: an unknown codec or table, or error feedback for a table whose bags are
                pooled by their owner: a bag has no next gradient to add it to.
        """
        given = dict(tables or {})
        unknown = sorted(given.keys() - {entry.table for entry in self.tables})
        if unknown:
            raise PlanError(f"wire: the plan has no tables {unknown}")
        entries = [replace(entry, wire=given.get(entry.table, wire)) for entry in self.tables]
        problems = [problem for entry in entries for problem in wire_problems(entry)]
        if problems:
            raise PlanError("\n".join(problems))
        return replace(self, tables=tuple(entries))

    def with_dense_wire(self, codec: str, rounding: str = "stochastic") -> ShardingPlan:
        """The same placement with another codec of the dense part's gradients.

        Raises:
            PlanError: an unknown codec or rounding.
        """
        plan = replace(self, dense_wire=DenseWire(codec, rounding))
        if problems := _dense_wire_problems(plan.dense_wire):
            raise PlanError("\n".join(problems))
        return plan

    def with_hot_rows(self, tables: Mapping[str, Sequence[int]]) -> ShardingPlan:
        """The same placement with other hot rows; tables that are not named keep theirs.

        Args:
            tables: rows by table, in any order.

        Raises:
            PlanError: an unknown table, or one that cannot have hot rows, with the reason.
        """
        unknown = sorted(tables.keys() - {entry.table for entry in self.tables})
        if unknown:
            raise PlanError(f"hot rows: the plan has no tables {unknown}")
        entries = tuple(replace(entry, hot_rows=tuple(sorted(tables[entry.table])))
                        if entry.table in tables else entry for entry in self.tables)
        problems = [problem for entry in entries for problem in hot_row_problems(entry)]
        if problems:
            raise PlanError("\n".join(problems))
        return replace(self, tables=entries)

    def check(self, tables: Sequence[EmbeddingBagConfig], world_size: int) -> None:
        """Refuses a plan that does not cover exactly these tables on so many ranks of a job.

        Raises:
            PlanError: lists every mismatch by table name.
        """
        problems = []
        if self.job_ranks != world_size:
            groups = "" if self.replicas == 1 else f" ({self.replicas} groups of {self.world_size})"
            problems.append(f"plan is for {self.job_ranks} ranks{groups}, this job runs "
                            f"{world_size}; plan again for this world size")
        planned = {entry.table: entry for entry in self.tables}
        if len(planned) != len(self.tables):
            problems.append("plan names a table twice")
        wanted = {table.name: table for table in tables}
        problems += [f"table {name!r} is not in the plan" for name in wanted if name not in planned]
        problems += [f"plan names table {name!r}, which the model does not have"
                     for name in planned if name not in wanted]
        for name in planned.keys() & wanted.keys():
            problems += _cover_problems(planned[name], wanted[name], self.world_size)
            problems += wire_problems(planned[name])
            problems += hot_row_problems(planned[name])
            if self.replicas > 1 and planned[name].hot_rows:
                problems.append(f"table {name!r}: hot rows are copied to the ranks of one group "
                                "and cannot be kept alike over replicas; leave hot_rows or "
                                "parallel.replicas out")
            if self.replicas > 1 and (problem := replica_problem(planned[name].storage,
                                                                 self.sync_every_steps)):
                problems.append(f"table {name!r}: {problem}")
        problems += _dense_wire_problems(self.dense_wire)
        if problems:
            raise PlanError("\n".join(sorted(problems)))


def _table_from(entry: dict[str, Any]) -> TablePlan:
    shards = tuple(Shard(**{**shard, "bytes": TierBytes(**shard.get("bytes", {}))})
                   for shard in entry["shards"])
    storage = parse_storage(entry.get("storage"), f"table {entry['table']!r}: storage")
    if isinstance(storage, Choice):
        raise ValueError(f"table {entry['table']!r}: a plan holds one storage, not a choice")
    return TablePlan(**{**entry, "sharding": ShardingType(entry["sharding"]),
                        "exchange": ExchangeKind(entry["exchange"]), "shards": shards,
                        "storage": storage, "wire": WireDtypes(**entry.get("wire", {})),
                        "hot_rows": rows_from_text(entry.get("hot_rows", ""))})


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
    barred = sorted({shard.rank for shard in plan.shards} - set(table.ranks)) if table.ranks else []
    if barred:
        problems.append(f"{where}: has shards on ranks {barred}, the job allows ranks "
                        f"{list(table.ranks)}; plan again, or change the table's ranks")
    if problems:
        return problems
    if plan.replicated:
        whole = all((s.rows, s.columns) == (rows, columns) for s in plan.shards)
        if not whole or sorted(s.rank for s in plan.shards) != list(range(world)):
            return [f"{where}: data_parallel needs one whole copy on each of {world} ranks"]
        return []
    if problems := _cut_problems(plan, table):
        return problems
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for shard in plan.shards:
        spans.setdefault((shard.row_start, shard.row_end), []).append(
            (shard.col_start, shard.col_end))
    if not _tiles(sorted(spans), rows) or \
            not all(_tiles(sorted(span), columns) for span in spans.values()):
        return [f"{where}: shards do not tile {rows} rows x {columns} columns exactly once"]
    return []


def _cut_problems(plan: TablePlan, table: EmbeddingBagConfig) -> list[str]:
    """Cuts that the storage cannot be cut at, such as through the slices of a core."""
    try:
        row_unit, column_unit = cut_units(plan.storage, table.num_embeddings, table.embedding_dim)
    except ConfigError as error:
        return [f"table {table.name!r}: {error}"]
    for shard in plan.shards:
        if shard.row_start % row_unit or shard.col_start % column_unit:
            return [f"table {table.name!r}: {describe_storage(plan.storage)} is cut at multiples "
                    f"of {row_unit} rows and {column_unit} columns, found a shard from row "
                    f"{shard.row_start} and column {shard.col_start} on"]
    return []


def _codec_problems(codecs: Mapping[str, str], rounding: str, where: str) -> list[str]:
    """What is wrong with codecs, by the name of their field, and how they round."""
    problems = [f"{where}.{name}: unknown codec {codec!r}{nearest_name(codec, list(DTYPES))}; "
                f"known: {', '.join(DTYPES)}"
                for name, codec in codecs.items() if codec not in DTYPES]
    if rounding not in ROUNDINGS:
        problems.append(f"{where}.rounding: unknown {rounding!r}; known: {', '.join(ROUNDINGS)}")
    return problems


def _dense_wire_problems(wire: DenseWire) -> list[str]:
    return _codec_problems({"codec": wire.codec}, wire.rounding, "dense_wire")


def wire_problems(plan: TablePlan) -> list[str]:
    """What a table cannot have on the wire."""
    wire, where = plan.wire, f"table {plan.table!r}: wire"
    problems = _codec_problems({"forward": wire.forward, "backward": wire.backward}, wire.rounding,
                               where)
    if wire.error_feedback and plan.exchange is ExchangeKind.POOLED:
        problems.append(f"{where}.error_feedback: needs exchange rows; a pooled bag's gradient "
                        "belongs to no row that could carry what rounding took")
    return problems


#: Sharding types whose row blocks are whole rows on one rank each.
_WHOLE_ROWS = (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.TABLE_WISE)


def hot_row_obstacle(plan: TablePlan) -> str | None:
    """Why a table as it is planned cannot have hot rows; None: it can."""
    if plan.sharding not in _WHOLE_ROWS:
        reason = "every rank has all rows already" if plan.replicated else \
            "its columns spread every row over several ranks already"
        return f"it is {plan.sharding.value}, {reason}"
    if plan.exchange is ExchangeKind.POOLED:
        return "its bags are pooled at their owners, which must then have all their rows"
    if not isinstance(plan.storage, RowsSpec) or len(plan.storage.levels) > 1:
        return f"its storage is {describe_storage(plan.storage)}, and copies need one level of rows"
    return None


def hot_row_problems(plan: TablePlan) -> list[str]:
    """What is wrong with a table's hot rows."""
    if not plan.hot_rows:
        return []
    where, rows = f"table {plan.table!r}: hot_rows", plan.hot_rows
    if obstacle := hot_row_obstacle(plan):
        return [f"{where}: {obstacle}"]
    last = max(shard.row_end for shard in plan.shards) - 1
    outside = [row for row in rows if not 0 <= row <= last]
    if outside:
        return [f"{where}: row {outside[0]} is outside the table, whose last row is {last}"]
    if len(set(rows)) < len(rows) or list(rows) != sorted(rows):
        twice = sorted({row for row in rows if rows.count(row) > 1})
        return [f"{where}: rows must be ascending and different; found "
                + (f"row {twice[0]} twice" if twice else "another order")]
    return []


def _tiles(spans: list[tuple[int, int]], size: int) -> bool:
    ends = [0, *(end for _, end in spans)]
    return bool(spans) and ends[-1] == size and \
        all(start == end for (start, _), end in zip(spans, ends, strict=False))


def even_splits(size: int, parts: int, unit: int = 1) -> list[tuple[int, int]]:
    """[start, end) of up to ``parts`` nearly equal, non-empty pieces of range(size).

    Args:
        size: end of the last piece.
        parts: pieces wanted.
        unit: pieces begin at multiples of it.
    """
    units = -(-size // unit)
    parts = max(1, min(parts, units))
    bounds = [min(size, unit * (units * i // parts)) for i in range(parts + 1)]
    return list(pairwise(bounds))


def build_table_plan(table: EmbeddingBagConfig, sharding: ShardingType, ranks: Sequence[int], *,
                     columns: int = 1, exchange: ExchangeKind | None = None,
                     storage: StorageSpec | None = None) -> TablePlan:
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
        storage: how the shards are held; None takes the table's own. Levels that name no tier
            lie on hbm.

    Raises:
        PlanError: more column blocks than columns, ranks that do not divide into groups, or a
            storage that is still a choice.
    """
    rows, dim = table.num_embeddings, table.embedding_dim
    ranks = list(ranks)
    where = f"table {table.name!r}, {sharding.value}"
    held = resolve_storage(storage or table.storage, rows, dim)
    if isinstance(held, Choice):
        raise PlanError(f"{where}: the table's storage is still a choice of "
                        f"{len(held.options)}; let the planner choose, or name one")
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
        shards = [Shard(rank, 0, rows, 0, dim) for rank in ranks]
    else:
        if len(groups) > dim:
            raise PlanError(f"{where}: {len(groups)} column blocks asked, "
                            f"the table has {dim} columns")
        row_unit, column_unit = cut_units(held, rows, dim)
        spans = even_splits(dim, len(groups), column_unit)
        shards = [Shard(rank, *block, *span)
                  for group, span in zip(groups, spans, strict=False)
                  for rank, block in zip(group, even_splits(rows, len(group), row_unit),
                                         strict=False)]
    return TablePlan(table.name, sharding, exchange or table.exchange, tuple(shards),
                     place_home(held, Tier.HBM))
