"""``shardlab stats``: what the ids of real data look like, for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from shardlab.launch.statistics import Work
    from shardlab.planner.statistics import IdStatistics, Statistics

_JOB_ENDINGS = (".yaml", ".yml")
_MOST_IDS = 1 << 17
#: Batches and caches that the printed table shows.
_BATCHES = (2048, 16384)
_CACHES = (0.01, 0.1)
_BLOCKS = 8


@click.command()
@click.argument("data", metavar="DATA|JOB.yaml")
@click.option("-o", "--output", metavar="FILE", type=click.Path(dir_okay=False, writable=True),
              help="Write the statistics here, as JSON; `shardlab plan --stats` reads it.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N",
              help="Read at most N samples; default: all.")
@click.option("--feature", "features", multiple=True, metavar="COLUMN",
              help="Column of a Parquet file to read as a feature; can be repeated. Default: the "
                   "26 of Criteo.")
@click.option("--label", default="label", show_default=True, metavar="COLUMN",
              help="Label column of a Parquet file.")
@click.option("--most-ids", type=click.IntRange(min=1024), default=_MOST_IDS, show_default=True,
              help="Different ids of a feature that are followed; figures of features with more "
                   "are partly estimates. 100 bytes of memory each.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override a value of the job. Can be repeated.")
def stats(data: str, output: str | None, samples: int | None, features: tuple[str, ...],
          label: str, **options: object) -> int:
    """Read data once and describe its ids.

    Pooling, repetition, hot rows, cache misses and skew. DATA is a raw Criteo log (.tsv, .txt) or
    Parquet, a file or a quoted pattern. With a job file the rows are those that train in it, hashed
    to its tables.
    """
    from rich.console import Console

    work = _work(data, samples, features, label, options["overrides"])  # type: ignore[arg-type]
    console = Console()
    found = _measure(work, options["most_ids"], console)  # type: ignore[arg-type]
    console.print(_table(found))
    if output is not None:
        Path(output).write_text(found.to_json(), encoding="utf-8")
        click.echo(f"statistics written to {output}")
    return 0


def _work(data: str, samples: int | None, features: tuple[str, ...], label: str,
          overrides: tuple[str, ...]) -> Work:
    from shardlab.errors import ConfigError

    if Path(data).suffix not in _JOB_ENDINGS:
        if overrides:
            raise ConfigError(f"--set changes a job; {data} is none")
        from shardlab.launch.statistics import file_work

        return file_work(data, features, label, samples)
    if features:
        raise ConfigError(f"--feature names columns of a file; the job {data} names its own")
    if not Path(data).is_file():
        raise ConfigError(f"job file {data}: not found")
    from shardlab.cli.job import read_job
    from shardlab.launch.statistics import job_work

    return job_work(read_job(data, False, overrides), data, samples)


def _measure(work: Work, most_ids: int, console: object) -> Statistics:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from shardlab.launch.statistics import measure

    columns = ("reading samples", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:  # type: ignore[arg-type]
        task = bar.add_task("", total=work.rows[1] - work.rows[0])
        return measure(work, most_ids, lambda done: bar.update(task, completed=done))


def _table(found: Statistics) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"{found.data}: {found.samples:,} samples", box=SIMPLE_HEAD,
                  padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
                  title_justify="left", caption_justify="left", caption=(
                      "different ids in a batch, of all ids of it; hot: share of ids that take "
                      "one of the 1 % hottest rows in use; LRU: share that a cache of 1 % and "
                      f"10 % of the rows in use misses; x{_BLOCKS}: fullest of {_BLOCKS} row "
                      "blocks, 1.0 is even; ~ estimated from a sample of the ids"))
    table.add_column("feature", overflow="fold")
    for heading in ("rows", "in use", "ids/bag", *(f"{size // 1024}k" for size in _BATCHES),
                    "hot", *(f"LRU {share:.0%}" for share in _CACHES), f"x{_BLOCKS}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in found.records:
        table.add_row(*_cells(record))
    return table


def _cells(record: IdStatistics) -> list[str]:
    from shardlab.launch.statistics import UNKNOWN_ROWS

    used = record.distinct
    mark = "" if record.followed == 1 else "~"
    bag = f"{record.pooling_factor:.3g}"
    if record.max_pooling > 1:
        bag += f" (to {record.max_pooling})"
    per_sample = max(record.pooling_factor * len(record.features), 1e-9)
    different = [float(record.unique_ids(size)) / (size * per_sample) for size in _BATCHES]
    blocks = min(_BLOCKS, record.rows)
    return [", ".join(record.features),
            "-" if record.rows == UNKNOWN_ROWS else _count(record.rows),
            mark + _count(used), bag, *(f"{share:.3f}" for share in different),
            f"{mark}{float(record.hot_share(max(used / 100, 1))):.0%}",
            *(f"{mark}{_miss(record, share):.0%}" for share in _CACHES),
            f"{float(record.fullest_block(blocks)) * blocks:.2g}"]


def _count(number: float) -> str:
    """Up to five digits as they are, larger numbers in thousands or millions."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 100 * size or (unit == "M" and number >= size):
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _miss(record: IdStatistics, share: float) -> float:
    return float(record.miss_ratio(max(record.distinct * share, 1)))
