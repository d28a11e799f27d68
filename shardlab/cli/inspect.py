"""``shardlab inspect``: what is in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardlab.words import counted

if TYPE_CHECKING:
    from rich.console import Console

    from shardlab.inspection.scan import Histogram
    from shardlab.train.checkpoint_reader import CheckpointReader
    from shardlab.train.manifest import TableEntry

_SHOWN_COLUMNS = 8
_BAR = 40


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("table", required=False)
@click.option("--rows", help="These rows, with their optimiser state: 5,9.")
@click.option("--top-norm", type=click.IntRange(1), metavar="N", help="The N longest rows.")
@click.option("--dead", is_flag=True, help="Rows that never got a gradient.")
@click.option("--stats", is_flag=True, help="Moments, norms and a histogram (the default).")
@click.option("--neighbors", type=int, metavar="ROW", help="Rows of the most similar direction.")
@click.option("--count", type=click.IntRange(1), default=20, show_default=True,
              help="How many rows --dead and --neighbors list.")
@click.option("--verify", is_flag=True, help="Read every file against its checksum first.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the histogram of --stats.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(checkpoint: Path, table: str | None, as_json: bool, verify: bool,
            **asked: Any) -> int:
    """Show what CHECKPOINT holds, or what is in a TABLE of it.

    Needs no GPU and no model.
    """
    from rich.console import Console

    from shardlab.train.checkpoint_reader import CheckpointReader

    console = Console()
    if verify:
        from shardlab.train.retention import verify as judge

        count = judge(checkpoint)
        if not as_json:
            console.print(f"every file is whole: {count:,} bytes read", highlight=False)
    reader = CheckpointReader(checkpoint)
    one = [name for name in ("rows", "top_norm", "dead", "stats", "neighbors")
           if asked[name] not in (None, False)]
    if table is None:
        if one or asked["plot"]:
            raise click.UsageError("name a TABLE: " + ", ".join(t.name for t in reader.tables))
        _show_overview(console, reader, as_json)
        return 0
    if len(one) > 1:
        raise click.UsageError("one of --rows, --top-norm, --dead, --stats, --neighbors at a time")
    what = one[0] if one else "stats"
    value = _ANSWERS[what](reader, reader.table(table), asked)
    if as_json:
        click.echo(json.dumps(_finite(value), indent=1))
    else:
        _SHOWERS[what](console, value)
    return 0


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's error stream."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(),
                  console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"rows of {name}", total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


def _rows(reader: CheckpointReader, table: TableEntry, asked: dict[str, Any]) -> Any:
    from shardlab.inspection import read_rows

    try:
        numbers = [int(part) for part in asked["rows"].split(",")]
    except ValueError:
        raise click.BadParameter(f"{asked['rows']!r} is not a list of rows such as 5,9",
                                 param_hint="--rows") from None
    return [asdict(row) for row in read_rows(reader, table, numbers)]


def _top(reader: CheckpointReader, table: TableEntry, asked: dict[str, Any]) -> Any:
    from shardlab.inspection import top_rows

    with _progress(table.name) as progress:
        found = top_rows(reader, table, asked["top_norm"], progress)
    return [{"row": row.row, "norm": row.norm} for row in found]


def _dead(reader: CheckpointReader, table: TableEntry, asked: dict[str, Any]) -> Any:
    from shardlab.inspection import dead_rows

    with _progress(table.name) as progress:
        count, first = dead_rows(reader, table, asked["count"], progress)
    return {"table": table.name, "rows": table.rows, "dead": count, "first": first}


def _neighbors(reader: CheckpointReader, table: TableEntry, asked: dict[str, Any]) -> Any:
    from shardlab.inspection import neighbors

    with _progress(table.name) as progress:
        found = neighbors(reader, table, asked["neighbors"], asked["count"], progress)
    return [asdict(row) for row in found]


def _stats(reader: CheckpointReader, table: TableEntry, asked: dict[str, Any]) -> Any:
    from shardlab.inspection import table_stats
    from shardlab.inspection.plot import plot_norms

    with _progress(table.name) as progress:
        found = table_stats(reader, table, progress)
    if asked["plot"]:
        plot_norms(found, asked["plot"])
    return asdict(found)


# ---------------------------------------------------------------- for people
def _show_overview(console: Console, reader: CheckpointReader, as_json: bool) -> None:
    from rich.table import Table

    from shardlab.inspection import overview

    found = overview(reader)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    base = f", builds on {found.base}" if found.base else ""
    console.print(f"{found.path}: step {found.steps:,}, {found.optimizer}, saved by "
                  f"{counted(found.world_size, 'rank')}, {counted(found.files, 'file')} of "
                  f"{found.file_bytes:,} bytes{base}", highlight=False, soft_wrap=True)
    grid = Table("table", "rows", "columns", "storage", "pooling", "features")
    for entry in found.tables:
        grid.add_row(entry["name"], f"{entry['rows']:,}", str(entry["columns"]), entry["storage"],
                     entry["pooling"], ", ".join(entry["features"]))
    console.print(grid)


def _show_rows(console: Console, found: list[dict[str, Any]]) -> None:
    for row in found:
        console.print(f"row {row['row']:,}  norm {row['norm']:.6g}", highlight=False)
        for name, value in {"weights": row["weights"], **row["state"]}.items():
            values = value if isinstance(value, list) else [value]
            more = "" if len(values) <= _SHOWN_COLUMNS else f"  ... {len(values)} in all"
            text = "  ".join(f"{number:.4g}" for number in values[:_SHOWN_COLUMNS])
            console.print(f"  {name}: {text}{more}", highlight=False, soft_wrap=True)


def _show_list(console: Console, found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    grid = Table(*found[0]) if found else Table("row")
    for row in found:
        grid.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
                       for value in row.values()))
    console.print(grid)


def _show_dead(console: Console, found: dict[str, Any]) -> None:
    console.print(f"{found['dead']:,} of {found['rows']:,} rows of {found['table']} never got a "
                  f"gradient; the first: {', '.join(map(str, found['first'])) or 'none'}",
                  highlight=False, soft_wrap=True)


def _show_stats(console: Console, found: dict[str, Any]) -> None:
    dead = "unknown" if found["dead_rows"] is None else f"{found['dead_rows']:,}"
    lines = [f"{found['table']}: {found['rows']:,} rows x {found['columns']}",
             f"elements    mean {found['mean']:.4g}  std {found['std']:.4g}  least "
             f"{found['least']:.4g}  greatest {found['greatest']:.4g}  not finite "
             f"{found['not_finite']:,}",
             f"rows        zero {found['zero_rows']:,}  without a gradient {dead}",
             "norms       " + "  ".join(f"p{percent} {value:.4g}" for percent, value
                                        in found["norm_percentiles"].items())]
    lines += [f"{name:<11} mean {value['mean']:.4g}  greatest {value['greatest']:.4g}"
              for name, value in found["state"].items()]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    _show_histogram(console, found["norms"])


def _show_histogram(console: Console, norms: dict[str, Any] | Histogram) -> None:
    assert isinstance(norms, dict)
    edges, counts = norms["edges"][::2], norms["counts"]
    pairs = [counts[at] + counts[at + 1] for at in range(0, len(counts), 2)]
    most = max(1, *pairs)
    for edge, count in zip(edges, pairs, strict=False):
        bar = "#" * round(_BAR * count / most)
        console.print(f"  {edge:>10.4g}  {count:>13,}  {bar}", highlight=False, markup=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    from shardlab.train.run_folder import finite

    return finite(value)


_ANSWERS: dict[str, Callable[[CheckpointReader, TableEntry, dict[str, Any]], Any]] = {
    "rows": _rows, "top_norm": _top, "dead": _dead, "neighbors": _neighbors,
    "stats": _stats}
_SHOWERS: dict[str, Callable[[Console, Any], None]] = {
    "rows": _show_rows, "top_norm": _show_list, "dead": _show_dead,
    "neighbors": _show_list, "stats": _show_stats}
