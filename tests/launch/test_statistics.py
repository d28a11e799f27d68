"""Which rows `shardlab stats` reads, of jobs and of files, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardlab.config import load_job
from shardlab.errors import DataError
from shardlab.launch.statistics import file_work, job_work, measure
from shardlab.planner.statistics import Statistics
from shardlab.presets import CRITEO_SPARSE_NAMES
from tests.shardlab.data.criteo_rows import make_rows, write_parquet, write_tsv


def read(work, most_ids: int = 1000) -> tuple[Statistics, list[int]]:
    steps: list[int] = []
    return measure(work, most_ids, steps.append), steps


def lists(folder: Path, rows: int = 20) -> Path:
    """Parquet of a label, an id and a list of ids of 0 to 2."""
    path = folder / "clicks.parquet"
    pq.write_table(pa.table({
        "label": [row % 2 for row in range(rows)], "item": [row % 5 for row in range(rows)],
        "tags": [[7] * (row % 3) for row in range(rows)]}), path, row_group_size=8)
    return path


@pytest.mark.parametrize("write", [write_tsv, write_parquet])
def test_criteo_files_need_no_words(tmp_path: Path, write) -> None:
    rows = make_rows(50)
    path = write(tmp_path / ("a.tsv" if write is write_tsv else "a.parquet"), rows)
    found, steps = read(file_work(str(path), (), "label", None))
    assert (found.data, found.samples) == (str(path), 50)
    assert [record.features for record in found.records] == [(n,) for n in CRITEO_SPARSE_NAMES]
    assert all(record.ids == 50 for record in found.records)
    # Missing values are all one id; two values of a table of Criteo's size may collide.
    values = {row[16] for row in rows}  # C3: 10 million rows
    assert found.records[2].distinct == len(values)
    assert steps[-1] == 50


def test_columns_of_any_parquet_file(tmp_path: Path) -> None:
    found, _ = read(file_work(str(lists(tmp_path)), ("item", "tags"), "label", None))
    item, tags = found.records
    assert (item.ids, item.distinct, item.max_pooling) == (20, 5, 1)
    assert (tags.ids, tags.distinct, tags.max_pooling) == (19, 1, 2)


def test_no_more_samples_than_asked_for(tmp_path: Path) -> None:
    work = file_work(str(lists(tmp_path)), ("item",), "label", 7)
    assert work.rows == (0, 7)
    assert read(work)[0].samples == 7
    assert file_work(str(lists(tmp_path)), ("item",), "label", 700).rows == (0, 20)


def test_jobs_read_the_rows_that_train_hashed_to_their_tables(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_rows(40))
    job = load_job(None, [f"data={{kind: criteo_tsv, path: {path}, validation_fraction: 0.25}}",
                          "tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 3}"])
    found, _ = read(job_work(job, "my job", None))
    assert found.data == "the training rows of my job"
    assert found.samples == 30
    assert {record.rows for record in found.records} == {3}


def test_features_of_a_table_are_counted_together_too(tmp_path: Path) -> None:
    job = load_job(None, [
        "tables=[{name: t, num_embeddings: 50, embedding_dim: 4, feature_names: [C1, C2]}]",
        "data.train_rows=[0, 64]"])
    found, _ = read(job_work(job, "j", None))
    assert [record.features for record in found.records] == [("C1",), ("C2",), ("C1", "C2")]
    assert found.records[2].ids == found.records[0].ids + found.records[1].ids


def test_no_more_samples_of_a_job_than_asked_for() -> None:
    job = load_job(None, [
        "tables=[{name: t, num_embeddings: 50, embedding_dim: 4, feature_names: [C1]}]",
        "data.train_rows=[10, 64]"])
    assert job_work(job, "j", 20).rows == (10, 30)


@pytest.mark.parametrize(("name", "features", "text"), [
    ("a.tsv", ("C1",), "--feature names columns of Parquet files; a raw Criteo log has the 26"),
    ("clicks.parquet", (), "has not the columns of Criteo; it has label, item, tags; name the ones "
                           "to read with --feature COLUMN, or give a job file"),
    ("clicks.parquet", ("itme",), "itme"),
    ("none.parquet", (), "none.parquet"),
    ("text.parquet", (), "text.parquet: not a readable Parquet file"),
])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, features: tuple[str, ...],
                                      text: str) -> None:
    lists(tmp_path)
    write_tsv(tmp_path / "a.tsv", make_rows(3))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError) as caught:
        read(file_work(str(tmp_path / name), features, "label", None))
    assert text in str(caught.value)


def test_data_without_rows(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [])
    with pytest.raises(DataError, match=r"no row was read|empty"):
        read(file_work(str(path), (), "label", None))
