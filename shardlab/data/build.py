"""From plain arguments to a source of rows and a rank's reader of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from shardlab.data.criteo import CriteoTsvSource
from shardlab.data.reader import Reader
from shardlab.data.rows import RowSource
from shardlab.data.synthetic import SyntheticCriteoSource
from shardlab.errors import DataError, nearest_name


@dataclass(frozen=True)
class SourceSpec:
    """What to read, independent of ranks and batches.

    Attributes:
        kind: synthetic_criteo, criteo_tsv, criteo_parquet or parquet.
        features: feature name -> rows of its table; batches have them in this order.
        path: file, pattern, or several of them; not for synthetic_criteo.
        columns: feature name -> column; a feature that is not listed reads its own name's.
        on_bad_row: "error" raises and names the row, "skip" leaves it out and counts it; not
            for synthetic_criteo.
        seed: synthetic_criteo: picks the rows.
        label: parquet: column of the label.
        dense: parquet: columns of the dense features, in order.
        log_dense: parquet: dense values x become log(max(x, 0) + 1); the Criteo kinds always do.
        raw_integers: parquet: integer columns hold rows of the tables, and are not hashed.
    """

    kind: str
    features: Mapping[str, int]
    path: str | os.PathLike[str] | Sequence[str] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad_row: str = "error"
    seed: int = 0
    label: str = "label"
    dense: Sequence[str] = ()
    log_dense: bool = False
    raw_integers: bool = False


def _criteo_tsv(spec: SourceSpec) -> RowSource:
    return CriteoTsvSource(spec.path, spec.features, spec.columns, spec.on_bad_row)


def _criteo_parquet(spec: SourceSpec) -> RowSource:
    from shardlab.data.parquet import CRITEO_PARQUET, ParquetColumns, ParquetSource

    columns = ParquetColumns(CRITEO_PARQUET.label, CRITEO_PARQUET.dense, spec.columns,
                             CRITEO_PARQUET.log_dense, CRITEO_PARQUET.hex_strings)
    return ParquetSource(spec.path, spec.features, columns, spec.on_bad_row)


def _parquet(spec: SourceSpec) -> RowSource:
    from shardlab.data.parquet import ParquetColumns, ParquetSource

    columns = ParquetColumns(spec.label, tuple(spec.dense), spec.columns, spec.log_dense,
                             raw_integers=spec.raw_integers)
    return ParquetSource(spec.path, spec.features, columns, spec.on_bad_row)


def _synthetic_criteo(spec: SourceSpec) -> RowSource:
    return SyntheticCriteoSource(spec.features, spec.columns, spec.seed)


_FILE_FIELDS = {"path", "on_bad_row"}
#: kind -> (what builds it, fields that it reads besides kind, features and columns)
_KINDS: dict[str, tuple[Callable[[SourceSpec], RowSource], set[str]]] = {
    "synthetic_criteo": (_synthetic_criteo, {"seed"}),
    "criteo_tsv": (_criteo_tsv, _FILE_FIELDS),
    "criteo_parquet": (_criteo_parquet, _FILE_FIELDS),
    "parquet": (_parquet, _FILE_FIELDS | {"label", "dense", "log_dense", "raw_integers"}),
}


def build_source(spec: SourceSpec) -> RowSource:
    """Opens the rows that ``spec`` describes; readers for training and validation can share it.

    Raises:
        DataError: an unknown kind or word, a field that the kind does not read, a table
            without rows, or whatever is wrong with the files.
    """
    if spec.kind not in _KINDS:
        raise DataError(f"data kind {spec.kind!r} is unknown"
                        f"{nearest_name(spec.kind, list(_KINDS))}; known: {', '.join(_KINDS)}")
    build, read = _KINDS[spec.kind]
    plain = SourceSpec(spec.kind, spec.features, columns=spec.columns)
    for entry in fields(SourceSpec):
        value = getattr(spec, entry.name)
        if value != getattr(plain, entry.name) and entry.name not in read:
            raise DataError(f"data kind {spec.kind!r} does not read {entry.name!r}, "
                            f"found {value!r}; leave it out")
    if spec.on_bad_row not in ("error", "skip"):
        raise DataError(f"on_bad_row: expected error or skip, found {spec.on_bad_row!r}")
    for name, rows in spec.features.items():
        if rows < 1:
            raise DataError(f"feature {name!r}: its table must have 1 row or more, found {rows}")
    for name in spec.columns:
        if name not in spec.features:
            raise DataError(f"columns: no feature {name!r}"
                            f"{nearest_name(name, list(spec.features))}")
    return build(spec)


def build_reader(spec: SourceSpec, batch_size: int, *, rank: int = 0, world_size: int = 1,
                 start: int = 0, stop: int | None = None, drop_last: bool = False) -> Reader:
    """A rank's reader of the rows that ``spec`` describes.

    Args:
        spec: what to read.
        batch_size: rows per rank and step.
        rank: which part of every global batch is read.
        world_size: number of ranks.
        start: first row, counted over all files; a batch's ``position`` resumes behind it.
        stop: row to stop before; None: all rows.
        drop_last: leave out a last global batch that is not full.

    Raises:
        DataError: see `build_source` and `Reader`.
    """
    return Reader(build_source(spec), batch_size, rank=rank, world_size=world_size, start=start,
                  stop=stop, drop_last=drop_last)
