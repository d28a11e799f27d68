"""This rank's batches of a job's data: which rows train, which validate, and where to go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardlab.data import Batch, PrefetchLoader, Reader, RowSource, SourceSpec, build_source
from shardlab.errors import ConfigError

if TYPE_CHECKING:
    from shardlab.comm import Groups
    from shardlab.config import JobConfig

Range = tuple[int, int]


@dataclass
class JobReader:
    """This rank's part of a range of rows, in batches that a thread reads ahead.

    Attributes:
        source: the rows.
        start: first row of the range, counted over all ranks.
        stop: row behind the last one.
        batch_size: rows per rank and step.
        groups: the ranks.
    """

    source: RowSource
    start: int
    stop: int
    batch_size: int
    groups: Groups

    def __len__(self) -> int:
        return len(self._reader())

    def __iter__(self) -> Iterator[Batch]:
        on_gpu = self.groups.device.type == "cuda"
        with PrefetchLoader(self._reader(), pin_memory=on_gpu) as batches:
            yield from batches

    def _reader(self) -> Reader:
        return Reader(self.source, self.batch_size, rank=self.groups.rank,
                      world_size=self.groups.world_size, start=self.start, stop=self.stop)


def build_readers(job: JobConfig, groups: Groups) -> tuple[JobReader, JobReader | None]:
    """The readers of the rows that train and that validate; None: no row validates.

    Raises:
        ConfigError: the ranges do not fit the data.
        DataError: the data cannot be read; names file and line or row group.
    """
    data, source = job.data, build_job_source(job)
    train, validation = split_rows(source.num_rows(), data.train_rows, data.validation_rows,
                                   data.validation_fraction)
    reader = JobReader(source, *train, job.batch_size, groups)
    return reader, None if validation is None else \
        JobReader(source, *validation, job.batch_size, groups)


def build_job_source(job: JobConfig) -> RowSource:
    """The rows of a job's data, hashed to the job's tables.

    Raises:
        DataError: the data cannot be read.
    """
    data, columns = job.data, job.data.columns
    features = {feature: table.num_embeddings for table in job.table_configs()
                for feature in table.feature_names}
    return build_source(SourceSpec(
        data.kind, features, data.path, columns.sparse, data.on_bad_row, data.seed, columns.label,
        columns.dense, columns.log_dense, columns.raw_integers))


def split_rows(num_rows: int | None, train: tuple[int, int | None] | None,
               validation: tuple[int, int | None] | None,
               fraction: float | None) -> tuple[Range, Range | None]:
    """Which rows train and which validate.

    Args:
        num_rows: rows of the data; None: endless, then both ranges have an end of their own.
        train: as in the job; None: what validation leaves, before it or else behind it.
        validation: as in the job.
        fraction: share of all rows, from the end, that validates where ``validation`` is None.

    Raises:
        ConfigError: a range without a row, or validation in the middle and ``train`` None.
    """
    checked = None
    if validation is not None:
        checked = _clip("validation_rows", validation, num_rows)
    elif fraction and num_rows is not None:
        checked = _clip("validation_fraction", (num_rows - round(fraction * num_rows), num_rows),
                        num_rows)
    if train is None and checked is not None:
        if checked[0] > 0 and checked[1] != num_rows:
            raise ConfigError(f"data.train_rows: rows lie before and behind those that validate, "
                              f"{list(checked)} of {num_rows}; say which of them train")
        train = (0, checked[0]) if checked[0] > 0 else (checked[1], num_rows)
    return _clip("train_rows", train or (0, num_rows), num_rows), checked


def _clip(name: str, rows: tuple[int, int | None], num_rows: int | None) -> Range:
    start, stop = rows
    bounds = [bound for bound in (stop, num_rows) if bound is not None]
    if not bounds:
        raise ConfigError(f"data.{name}: the data has no end of its own; give [start, stop]")
    if start >= min(bounds):
        raise ConfigError(f"data.{name}: rows [{start}, {stop}) hold no row of the data, which "
                          f"has {num_rows}")
    return start, min(bounds)
