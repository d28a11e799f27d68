"""Statistics of real ids, as ``shardlab stats`` writes them: plain data and JSON, no torch.

    {"schema": "shardlab-statistics", "version": 1, "data": "...", "samples": 123425,
     "records": [{"features": ["C1"], "rows": 1460, ...}, ...]}

A record describes the ids of one feature, or of all features of a table together. Its fields are
those of `IdStatistics`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardlab.errors import ConfigError, nearest_name

Floats = NDArray[np.float64]
Points = tuple[tuple[float, ...], ...]

SCHEMA, VERSION = "shardlab-statistics", 1
#: Stands for 0 where a logarithm is taken.
_ALMOST_NONE = 1e-9


@dataclass(frozen=True)
class IdStatistics:
    """The ids of a group of features over all samples that were read.

    Attributes:
        features: the features, read as one stream where there are several.
        rows: rows of the table that values were hashed to, or that ids index.
        samples: samples read.
        ids: ids of all features in them.
        max_pooling: ids of the largest bag.
        distinct: different ids.
        followed: share of the ids, taken by a hash of the id, that the figures come from; 1:
            they are exact. Otherwise ``distinct``, ``hot``, ``miss`` and ``unique`` of large
            batches are estimates (`shardlab.data.reuse`).
        unique: (samples of a batch, mean number of different ids in it), ascending.
        hot: (rows, share of ids that take one of so many most frequent rows), ascending.
        miss: (rows of an LRU cache that starts empty, share of ids that it misses), ascending;
            the first use of a row is a miss.
        blocks: (equal blocks that the rows are cut into, share of ids in the fullest one, share
            of different ids of a batch in the fullest one), ascending.
        hottest: (row, ids that take it) of the most frequent rows, those first; in the file one
            line of text, ``row:ids row:ids``. Absent where it was not recorded.
    """

    features: tuple[str, ...]
    rows: int
    samples: int
    ids: int
    max_pooling: int
    distinct: float
    followed: float
    unique: Points
    hot: Points
    miss: Points
    blocks: Points
    hottest: tuple[tuple[int, int], ...] = ()

    @property
    def pooling_factor(self) -> float:
        """Mean ids of a bag."""
        return self.ids / max(self.samples * len(self.features), 1)

    def unique_ids(self, samples: ArrayLike) -> Floats:
        """Mean number of different ids in a batch of so many samples.

        Between measured sizes straight in logarithms. Beyond the largest one the curve goes on as
        steeply as it ended, up to the table's rows.
        """
        size = np.maximum(np.asarray(samples, dtype=np.float64), _ALMOST_NONE)
        (x, y) = np.log(np.maximum(np.array(self.unique), _ALMOST_NONE)).T
        slope = 0.0 if len(x) < 2 else min(max((y[-1] - y[-2]) / (x[-1] - x[-2]), 0.0), 1.0)
        found = np.exp(np.interp(np.log(size), x, y)
                       + slope * np.maximum(np.log(size) - x[-1], 0.0))
        smallest = size / math.exp(x[0])  # below the smallest size ids hardly repeat
        return np.asarray(np.minimum(found * np.minimum(smallest, 1.0), self.rows))

    def hot_share(self, rows: ArrayLike) -> Floats:
        """Share of ids that take one of the ``rows`` most frequent rows."""
        return _curve(self.hot, rows, 0.0)

    def miss_ratio(self, cache_rows: ArrayLike) -> Floats:
        """Share of ids that an LRU cache of so many rows misses; 0 if it holds the table."""
        found = _curve(self.miss, cache_rows, 1.0)
        return np.asarray(np.where(np.asarray(cache_rows) >= self.rows, 0.0, found))

    def fullest_block(self, parts: ArrayLike) -> Floats:
        """Share of ids in the fullest of so many equal blocks of rows."""
        return self._block(parts, 1)

    def fullest_unique_block(self, parts: ArrayLike) -> Floats:
        """Share of a batch's different ids in the block that holds most of them over time."""
        return self._block(parts, 2)

    def _block(self, parts: ArrayLike, column: int) -> Floats:
        points, count = np.array(self.blocks), np.asarray(parts, dtype=np.float64)
        found = np.exp(np.interp(np.log(count), np.log(points[:, 0]), np.log(points[:, column])))
        return np.asarray(np.maximum(found, 1.0 / count))


def _curve(points: Points, x: ArrayLike, at_zero: float) -> Floats:
    """A curve that starts at (0, at_zero): straight to its first point, then in log x."""
    known, wanted = np.array(points), np.asarray(x, dtype=np.float64)
    first = known[0, 0]
    near = at_zero + (known[0, 1] - at_zero) * wanted / first
    far = np.interp(np.log(np.maximum(wanted, first)), np.log(known[:, 0]), known[:, 1])
    return np.asarray(np.where(wanted < first, near, far))


@dataclass(frozen=True)
class Statistics:
    """What ``shardlab stats`` found in a set of data.

    Attributes:
        data: what was read, in words.
        samples: samples read.
        records: one per feature, and one per table with several features.
    """

    data: str
    samples: int
    records: tuple[IdStatistics, ...]

    def of(self, features: Sequence[str]) -> list[IdStatistics]:
        """The record of these features together, or else the records of each of them.

        Raises:
            ConfigError: names every feature without a record.
        """
        together = {frozenset(record.features): record for record in self.records}
        if (found := together.get(frozenset(features))) is not None:
            return [found]
        known = sorted({name for record in self.records for name in record.features})
        absent = [name for name in features if frozenset([name]) not in together]
        if absent:
            raise ConfigError([
                f"statistics of {self.data}: no feature {name!r}{nearest_name(name, known)}; run "
                "`shardlab stats` on data that has it" for name in absent])
        return [together[frozenset([name])] for name in features]

    def to_json(self) -> str:
        """JSON text that `read_statistics` reads."""
        data = {"schema": SCHEMA, "version": VERSION, "data": self.data, "samples": self.samples,
                "records": [{**asdict(record), "hottest": " ".join(
                    f"{row}:{ids}" for row, ids in record.hottest)} for record in self.records]}
        return json.dumps(data, indent=1)


def read_statistics(path: str | Path) -> Statistics:
    """Reads what ``shardlab stats -o FILE`` wrote.

    Raises:
        ConfigError: the file cannot be read, has another schema or version, or lists every
            missing, unknown or impossible field.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"statistics {path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"statistics {path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f"statistics {path}: not a file of `shardlab stats`: expected a mapping "
                          f"with schema {SCHEMA!r}")
    if data.get("version") != VERSION:
        raise ConfigError(f"statistics {path}: version {data.get('version')!r}; this release reads "
                          f"version {VERSION}; run `shardlab stats` again")
    problems = [] if isinstance(data.get("records"), list) else ["records: expected a list"]
    records = data["records"] if not problems else []
    for number, record in enumerate(records):
        problems += [f"records[{number}]{problem}" for problem in _problems(record)]
    if not isinstance(data.get("samples"), int):
        problems.append(f"samples: expected a whole number, found {data.get('samples')!r}")
    if problems:
        raise ConfigError([f"statistics {path}: {problem}" for problem in problems])
    return Statistics(str(data.get("data", path)), data["samples"],
                      tuple(_record(record) for record in records))


_HOTTEST = r"(\d+:\d+( \d+:\d+)*)?"
#: Curves -> columns of their points.
_CURVES = {"unique": 2, "hot": 2, "miss": 2, "blocks": 3}


def _problems(record: Any) -> Iterator[str]:
    """What is wrong with a record, each beginning with where."""
    if not isinstance(record, Mapping):
        yield f": expected a mapping, found {record!r}"
        return
    known = [entry.name for entry in fields(IdStatistics)]
    yield from (f".{key}: unknown{nearest_name(str(key), known)}" for key in record
                if key not in known)
    for key in known:
        value = record.get(key)
        if key == "hottest":
            if not re.fullmatch(_HOTTEST, value if isinstance(value, str) else str(value or "")):
                yield f".{key}: expected text such as '17:900 3:85', found {value!r}"
        elif key not in record:
            yield f".{key}: missing"
        elif key == "features":
            if not (isinstance(value, list) and value and all(isinstance(x, str) for x in value)):
                yield f".{key}: expected names, found {value!r}"
        elif key in _CURVES:
            if (problem := _curve_problem(value, _CURVES[key])) is not None:
                yield f".{key}: {problem}"
        elif not _is_number(value) or value < 0:
            yield f".{key}: expected a number of at least 0, found {value!r}"


def _curve_problem(value: Any, columns: int) -> str | None:
    if not isinstance(value, list) or not value or not all(
            isinstance(point, list) and len(point) == columns and all(map(_is_number, point))
            for point in value):
        return f"expected points of {columns} numbers"
    x = [point[0] for point in value]
    if x != sorted(set(x)) or x[0] <= 0:
        return f"expected ascending points from above 0, found {x}"
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _record(record: Mapping[str, Any]) -> IdStatistics:
    values = dict(record, features=tuple(record["features"]))
    values.update({key: tuple(tuple(point) for point in record[key]) for key in _CURVES})
    pairs = [pair.split(":") for pair in (record.get("hottest") or "").split()]
    values["hottest"] = tuple((int(row), int(ids)) for row, ids in pairs)
    return IdStatistics(**values)
