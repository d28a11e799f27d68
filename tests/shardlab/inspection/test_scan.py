"""What inspection tells equals what numpy says of the whole table, however its columns were cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shardlab.errors import CheckpointError
from shardlab.inspection import (
    dead_rows,
    neighbors,
    overview,
    read_rows,
    table_stats,
    top_rows,
)
from shardlab.storage import TableChunk
from shardlab.train import CheckpointReader
from shardlab.train.manifest import ALL, MANIFEST, Manifest, TableEntry
from shardlab.train.table_files import NamedChunk, TableFiles

ROWS, COLUMNS = 101, 6


def write(folder: Path, weights: torch.Tensor, state: dict[str, torch.Tensor],
          optimizer: str = "row_wise_adagrad") -> CheckpointReader:
    """A checkpoint of one table in four rectangles, columns cut 4 + 2."""
    written = TableFiles(folder, 0)
    chunks = [NamedChunk("ebc", TableChunk(
        "user", top, left, weights[top:bottom, left:right].clone(),
        {name: value[top:bottom].clone() if value.dim() == 1 else
         value[top:bottom, left:right].clone() for name, value in state.items()}), ALL)
        for top, bottom in ((0, 60), (60, len(weights))) for left, right in ((0, 4), (4, 6))]
    written.write(chunks)
    table = TableEntry("ebc", "user", len(weights), COLUMNS, "fp32", "sum", ("user",))
    manifest = Manifest(2, (table,), tuple(written.files), tuple(written.chunks), optimizer, 12)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return CheckpointReader(folder)


@pytest.fixture
def weights() -> torch.Tensor:
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    weights[[7, 100]] = 0
    weights[50] = 2 * weights[20]
    return weights


@pytest.fixture
def reader(tmp_path: Path, weights: torch.Tensor) -> CheckpointReader:
    state = torch.rand(ROWS, generator=torch.Generator().manual_seed(4)) + 0.1
    state[[0, 59, 60]] = 0
    return write(tmp_path, weights, {"sum": state})


def test_overview_reads_the_manifest_alone(reader: CheckpointReader) -> None:
    for path in reader.path.glob("rows-*"):
        path.write_bytes(bytes(path.stat().st_size))
    found = overview(reader)
    assert (found.steps, found.optimizer, found.world_size, found.base) == (
        12, "row_wise_adagrad", 2, None)
    assert found.tables == [{"name": "user", "collection": "ebc", "rows": ROWS, "columns": COLUMNS,
                             "storage": "fp32", "pooling": "sum", "features": ["user"],
                             "changed_chunks": 0}]


def test_rows_come_whole(reader: CheckpointReader, weights: torch.Tensor) -> None:
    found = read_rows(reader, reader.table("user"), [0, 60, 100])
    for row in found:
        assert row.weights == weights[row.row].tolist()
        assert row.norm == pytest.approx(float(weights[row.row].norm()))
    assert found[0].state == {"sum": 0.0}
    for bad in (-1, ROWS):
        with pytest.raises(CheckpointError, match=f"has rows 0 to 100, asked for row {bad}"):
            read_rows(reader, reader.table("user"), [bad])


def test_longest_rows_are_in_order(reader: CheckpointReader, weights: torch.Tensor) -> None:
    found = top_rows(reader, reader.table("user"), 9)
    norms, rows = weights.norm(dim=1).sort(descending=True)
    assert [row.row for row in found] == rows[:9].tolist()
    assert [row.norm for row in found] == pytest.approx(norms[:9].tolist())
    assert len(top_rows(reader, reader.table("user"), 500)) == ROWS


def test_dead_rows_are_those_without_state(reader: CheckpointReader) -> None:
    assert dead_rows(reader, reader.table("user"), 2) == (3, [0, 59])


def test_dead_rows_cannot_be_told_of_sgd(tmp_path: Path, weights: torch.Tensor) -> None:
    reader = write(tmp_path, weights, {}, "sgd")
    with pytest.raises(CheckpointError, match="trained by sgd, whose state does not tell"):
        dead_rows(reader, reader.table("user"), 2)
    assert table_stats(reader, reader.table("user")).dead_rows is None


def test_neighbours_by_cosine(reader: CheckpointReader, weights: torch.Tensor) -> None:
    found = neighbors(reader, reader.table("user"), 20, 5)
    cosines = torch.nn.functional.cosine_similarity(weights, weights[20:21], eps=1e-30)
    cosines[20] = -2
    assert [row.row for row in found] == cosines.sort(descending=True).indices[:5].tolist()
    assert found[0].row == 50
    assert found[0].cosine == pytest.approx(1.0)
    with pytest.raises(CheckpointError, match="row 7 of table 'user' is all zeros"):
        neighbors(reader, reader.table("user"), 7, 5)


def test_stats_equal_numpy(reader: CheckpointReader, weights: torch.Tensor) -> None:
    calls: list[tuple[int, int]] = []
    found = table_stats(reader, reader.table("user"), lambda *both: calls.append(both))
    values, norms = weights.double().numpy(), weights.norm(dim=1).numpy()
    assert (found.mean, found.std) == (pytest.approx(values.mean(), abs=1e-7),
                                       pytest.approx(values.std()))
    assert (found.least, found.greatest) == (values.min(), values.max())
    assert (found.zero_rows, found.dead_rows, found.not_finite) == (2, 3, 0)
    assert sum(found.norms.counts) == ROWS
    assert found.norms.edges[-1] == pytest.approx(norms.max())
    for percent, value in found.norm_percentiles.items():
        assert value == pytest.approx(np.percentile(norms, percent, method="inverted_cdf"),
                                      abs=2 * float(norms.max()) / 65536)
    assert calls[-1] == (ROWS, ROWS)


def test_odd_values_are_counted(tmp_path: Path, weights: torch.Tensor) -> None:
    weights[3, 1], weights[4, 5] = torch.nan, torch.inf
    found = table_stats(reader := write(tmp_path, weights, {}), reader.table("user"))
    assert found.not_finite == 2
    assert np.isfinite([found.mean, found.std, found.least, found.greatest]).all()
    assert sum(found.norms.counts) == ROWS - 2


def test_one_row_of_zeros(tmp_path: Path) -> None:
    found = table_stats(reader := write(tmp_path, torch.zeros(1, COLUMNS), {
        "exp_avg": torch.zeros(1, COLUMNS), "exp_avg_sq": torch.zeros(1)}), reader.table("user"))
    assert (found.zero_rows, found.dead_rows) == (1, 1)
    assert found.norm_percentiles[50] == 0.0
