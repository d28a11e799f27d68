"""What is wrong with a plan of a table, as sentences that name the table."""

from __future__ import annotations

from collections.abc import Mapping

from shardlab.errors import ConfigError, nearest_name
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_specs import DTYPES, ROUNDINGS, RowsSpec, cut_units, describe_storage
from shardlab.table_plan import DenseWire, TablePlan

#: Sharding types whose row blocks are whole rows on one rank each.
_WHOLE_ROWS = (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.TABLE_WISE)


def cover_problems(plan: TablePlan, table: EmbeddingBagConfig, world: int) -> list[str]:
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


def dense_wire_problems(wire: DenseWire) -> list[str]:
    """What gradients of the dense part cannot have on the wire."""
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
