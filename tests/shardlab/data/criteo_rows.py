"""Criteo-like rows for tests, and the readers' arithmetic written once more, row by row."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from shardlab.data import Batch
from shardlab.presets import CRITEO_DENSE_NAMES, CRITEO_SPARSE_NAMES

FEATURES = {name: 50 + 7 * i for i, name in enumerate(CRITEO_SPARSE_NAMES)}
MASK = (1 << 64) - 1


def make_rows(count: int, seed: int = 0) -> list[list[str]]:
    """Fields of valid lines, some missing."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        dense = ["" if rng.random() < 0.3 else
                 str(int(rng.choice([-3, 0, 1, 7, 123, 45_678, 123_456_789]) * rng.random() * 2))
                 for _ in CRITEO_DENSE_NAMES]
        sparse = ["" if rng.random() < 0.2 else f"{rng.randrange(1 << 32):08x}"
                  for _ in CRITEO_SPARSE_NAMES]
        rows.append([str(rng.randrange(2)), *dense, *sparse])
    return rows


def write_tsv(path: Path, rows: list[list[str]], end: str = "\n", last_end: bool = True) -> Path:
    text = end.join("\t".join(row) for row in rows)
    path.write_bytes((text + (end if last_end and rows else "")).encode())
    return path


def write_parquet(path: Path, rows: list[list[str]], row_group_size: int = 16) -> Path:
    """The same rows in the Criteo Parquet layout."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * 40
    arrays = {"label": pa.array([int(value) for value in columns[0]], pa.int8())}
    for name, values in zip(CRITEO_DENSE_NAMES, columns[1:14], strict=True):
        arrays[name] = pa.array([int(v) if v else None for v in values], pa.int64())
    for name, values in zip(CRITEO_SPARSE_NAMES, columns[14:], strict=True):
        arrays[name] = pa.array([v or None for v in values], pa.string())
    pq.write_table(pa.table(arrays), path, row_group_size=row_group_size)
    return path


def splitmix(x: int) -> int:
    """SplitMix64 on Python integers."""
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def place(hashed: int, rows: int) -> int:
    """The row of a present value's hash."""
    return 0 if rows == 1 else 1 + ((hashed >> 32) * (rows - 1) >> 32)


def expected_row(fields: list[str]) -> tuple[float, list[float], list[int]]:
    """Label, dense values and ids of one line, as the readers should give them."""
    dense = [math.log(max(int(value or 0), 0) + 1) for value in fields[1:14]]
    ids = [place(splitmix(int(value, 16)), rows) if value else 0
           for value, rows in zip(fields[14:], FEATURES.values(), strict=True)]
    return float(fields[0]), dense, ids


def check_batch(batch: Batch, rows: list[list[str]]) -> None:
    """The batch holds exactly these rows."""
    expected = [expected_row(row) for row in rows]
    assert batch.sparse.keys() == list(FEATURES)
    assert batch.sparse.stride() == len(batch.labels) == len(rows)
    assert batch.labels.tolist() == [label for label, _, _ in expected]
    dense = torch.tensor([dense for _, dense, _ in expected]).view(len(rows), 13)
    torch.testing.assert_close(batch.dense, dense, rtol=1e-6, atol=1e-6)
    ids = batch.sparse.values().view(len(FEATURES), len(rows)).t().tolist()
    assert ids == [ids for _, _, ids in expected]


def flat(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, dense and ids [n, features] of one-id batches, joined."""
    keys = len(batches[0].sparse.keys())
    return (torch.cat([batch.labels for batch in batches]),
            torch.cat([batch.dense for batch in batches]),
            torch.cat([batch.sparse.values().view(keys, -1).t() for batch in batches]))
