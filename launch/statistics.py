"""Statistics of the ids of a job's data, or of files without a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.data import RowSource, SourceSpec, build_source
from shardlab.data.statistics import IdFigures, collect
from shardlab.errors import DataError
from shardlab.launch.readers import build_job_source, split_rows
from shardlab.planner.statistics import IdStatistics, Statistics
from shardlab.presets import (
    CRITEO_DENSE_NAMES,
    CRITEO_KAGGLE_CARDINALITIES,
    CRITEO_SPARSE_NAMES,
)

if TYPE_CHECKING:
    from shardlab.config import JobConfig

#: Values of a feature whose table is not known are hashed to so many rows: collisions are rare.
UNKNOWN_ROWS = 1 << 40
_TEXT = (".tsv", ".txt")


@dataclass(frozen=True)
class Work:
    """What `measure` will read.

    Attributes:
        data: in words.
        source: the rows.
        groups: features that are read as one stream -> rows of their table.
        rows: the first row, and the row to stop before.
    """

    data: str
    source: RowSource
    groups: dict[tuple[str, ...], int]
    rows: tuple[int, int]


def job_work(job: JobConfig, name: str, samples: int | None) -> Work:
    """The rows that train in a job, by feature, and by table where a table has several features.

    Args:
        job: the job.
        name: how reports call it.
        samples: rows to read at most; None: all.

    Raises:
        ConfigError: the job's data has no row that trains.
        DataError: the data cannot be read.
    """
    source, data = build_job_source(job), job.data
    groups: dict[tuple[str, ...], int] = {}
    for table in job.table_configs():
        groups.update({(feature,): table.num_embeddings for feature in table.feature_names})
        groups[tuple(table.feature_names)] = table.num_embeddings
    (start, stop), _ = split_rows(source.num_rows(), data.train_rows, data.validation_rows,
                                  data.validation_fraction)
    return _bounded(Work(f"the training rows of {name}", source, groups, (start, stop)), samples)


def file_work(path: str, features: Iterable[str], label: str, samples: int | None) -> Work:
    """The features of a file without a job.

    Args:
        path: file or pattern; .tsv and .txt are raw Criteo logs, others Parquet.
        features: columns to read; none: the 26 of Criteo, with tables of Criteo Kaggle's sizes.
        label: Parquet column of the label.
        samples: rows to read at most; None: all.

    Raises:
        DataError: the file cannot be read, or is not Criteo's and no feature is named.
    """
    chosen, text = tuple(features), Path(path).suffix in _TEXT
    if chosen and text:
        raise DataError(f"{path}: --feature names columns of Parquet files; a raw Criteo log has "
                        "the 26 of Criteo; leave --feature out")
    if chosen:
        source = build_source(SourceSpec("parquet", dict.fromkeys(chosen, UNKNOWN_ROWS), path,
                                         label=label))
        groups: dict[tuple[str, ...], int] = {(name,): UNKNOWN_ROWS for name in chosen}
    else:
        kind = "criteo_tsv" if text else "criteo_parquet"
        if not text:
            _check_criteo(path)
        sizes = dict(zip(CRITEO_SPARSE_NAMES, CRITEO_KAGGLE_CARDINALITIES, strict=True))
        source = build_source(SourceSpec(kind, sizes, path))
        groups = {(name,): rows for name, rows in sizes.items()}
    work = Work(path, source, groups, (0, source.num_rows() or 0))
    return _bounded(work, samples)


def _check_criteo(path: str) -> None:
    """Says how to name the columns of a Parquet file that has not Criteo's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from shardlab.data.files import expand_paths

    first = expand_paths(path)[0]
    try:
        names = pq.read_schema(first).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{first}: not a readable Parquet file: "
                        f"{str(error).splitlines()[0]}") from None
    wanted = {"label", *CRITEO_DENSE_NAMES, *CRITEO_SPARSE_NAMES}
    if not wanted <= set(names):
        raise DataError(f"{first}: has not the columns of Criteo; it has {', '.join(names)}; name "
                        "the ones to read with --feature COLUMN, or give a job file")


def _bounded(work: Work, samples: int | None) -> Work:
    start, stop = work.rows
    return work if samples is None else replace(work, rows=(start, min(stop, start + samples)))


def measure(work: Work, most_ids: int, progress: Callable[[int], None]) -> Statistics:
    """Reads the rows once.

    Args:
        work: what to read.
        most_ids: different ids of a group that are followed.
        progress: is told how many rows have been read.

    Raises:
        DataError: a row cannot be read, or an id lies outside its table.
    """
    found = collect(work.source, work.groups, work.rows, most_ids, progress)
    samples = max((figures.samples for figures in found), default=0)
    if not samples:
        raise DataError(f"statistics of {work.data}: no row was read")
    return Statistics(work.data, samples, tuple(_record(figures) for figures in found))


def _record(figures: IdFigures) -> IdStatistics:
    return IdStatistics(**asdict(figures))

