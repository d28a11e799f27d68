"""Readers of click logs, a synthetic one, and background prefetch.

A source is rows with a global index; a `Reader` cuts one rank's batches out of it; a
`PrefetchLoader` reads them ahead. Names of Parquet files are loaded on first use: pyarrow takes
25 MB of every rank.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardlab.data.batch import Batch
from shardlab.data.build import SourceSpec, build_reader, build_source
from shardlab.data.criteo import CriteoTsvSource
from shardlab.data.loader import PrefetchLoader
from shardlab.data.reader import Reader
from shardlab.data.rows import RowSource
from shardlab.data.synthetic import SyntheticCriteoSource

if TYPE_CHECKING:
    from shardlab.data.parquet import CRITEO_PARQUET, ParquetColumns, ParquetSource

__all__ = [
    "CRITEO_PARQUET",
    "Batch",
    "CriteoTsvSource",
    "ParquetColumns",
    "ParquetSource",
    "PrefetchLoader",
    "Reader",
    "RowSource",
    "SourceSpec",
    "SyntheticCriteoSource",
    "build_reader",
    "build_source",
]


def __getattr__(name: str) -> Any:
    if name in ("CRITEO_PARQUET", "ParquetColumns", "ParquetSource"):
        return getattr(import_module("shardlab.data.parquet"), name)
    raise AttributeError(f"module 'shardlab.data' has no attribute {name!r}")
