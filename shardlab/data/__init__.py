"""Readers of click logs, a synthetic one, and background prefetch.

A source is rows with a global index; a `Reader` cuts one rank's batches out of it; a
`PrefetchLoader` reads them ahead.
"""

from shardlab.data.batch import Batch
from shardlab.data.build import SourceSpec, build_reader, build_source
from shardlab.data.criteo import CriteoTsvSource
from shardlab.data.loader import PrefetchLoader
from shardlab.data.parquet import CRITEO_PARQUET, ParquetColumns, ParquetSource
from shardlab.data.reader import Reader
from shardlab.data.rows import RowSource
from shardlab.data.synthetic import SyntheticCriteoSource

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
