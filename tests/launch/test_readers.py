"""Which rows train and which validate, and this rank's batches of them."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import pytest

from shardlab.comm import Groups
from shardlab.config import load_job
from shardlab.errors import ConfigError, DataError
from shardlab.launch.readers import JobReader, build_readers, split_rows


@pytest.mark.parametrize(("num_rows", "train", "validation", "fraction", "expected"), [
    (100, None, None, None, ((0, 100), None)),
    (100, (10, 20), None, None, ((10, 20), None)),
    (100, (10, None), (0, 10), None, ((10, 100), (0, 10))),
    (100, None, (90, 100), None, ((0, 90), (90, 100))),
    (100, None, (90, None), None, ((0, 90), (90, 100))),
    (100, None, (0, 25), None, ((25, 100), (0, 25))),
    (100, None, None, 0.1, ((0, 90), (90, 100))),
    (100, (0, 50), None, 0.25, ((0, 50), (75, 100))),
    (100, None, None, 0.0, ((0, 100), None)),
    (100, (0, 500), (100, 600), None, "rows [100, 600) hold no row of the data, which has 100"),
    (100, (0, 500), (99, 600), None, ((0, 100), (99, 100))),
    (100, (100, None), None, None, "data.train_rows: rows [100, None) hold no row"),
    (100, None, (40, 60), None, "data.train_rows: rows lie before and behind those that validate, "
                                "[40, 60] of 100; say which of them train"),
    (3, None, None, 0.1, "data.validation_fraction: rows [3, 3) hold no row"),
    (0, None, None, None, "data.train_rows: rows [0, 0) hold no row"),
    (None, (0, 9), (9, 12), None, ((0, 9), (9, 12))),
    (None, None, None, None, "data.train_rows: the data has no end of its own"),
    (None, (0, 9), (9, None), None, "data.validation_rows: the data has no end of its own"),
], ids=lambda value: str(value)[:24])
def test_split_rows(num_rows, train, validation, fraction, expected):
    if isinstance(expected, str):
        with pytest.raises(ConfigError) as caught:
            split_rows(num_rows, train, validation, fraction)
        assert expected in str(caught.value)
    else:
        assert split_rows(num_rows, train, validation, fraction) == expected


def tsv(folder: Path, rows: int, bad: tuple[int, ...] = ()) -> Path:
    """Criteo rows whose label is 1 for every third; rows in ``bad`` are cut short."""
    path = folder / "clicks.tsv"
    lines = []
    for row in range(rows):
        fields = [str(int(row % 3 == 0)), *[str(row)] * 13, *[f"{row:08x}"] * 26]
        lines.append("\t".join(fields[:20] if row in bad else fields))
    path.write_text("\n".join(lines) + "\n")
    return path


def readers(path: Path, *overrides: str, rank: int = 0, world_size: int = 1):
    tables = "tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 50}"
    job = load_job(None, [f"data={{kind: criteo_tsv, path: {path}}}", tables, "batch_size=4",
                          *overrides])
    return build_readers(job, Groups(rank=rank, world_size=world_size))


def labels(reader: JobReader) -> list[float]:
    return [label for batch in reader for label in batch.labels.tolist()]


def test_readers_cover_their_ranges_in_batches(tmp_path):
    train, validation = readers(tsv(tmp_path, 20), "data.validation_fraction=0.25")
    assert [len(batch) for batch in train] == [4, 4, 4, 3]
    assert [batch.position for batch in train] == [4, 8, 12, 15]
    assert len(train) == 4
    assert labels(train) == [float(row % 3 == 0) for row in range(15)]
    assert validation is not None
    assert labels(validation) == [float(row % 3 == 0) for row in range(15, 20)]


def test_features_have_the_tables_sizes(tmp_path):
    train, validation = readers(tsv(tmp_path, 20))
    assert validation is None
    batch = next(iter(train))
    assert batch.sparse.keys() == [f"C{i}" for i in range(1, 27)]
    assert int(batch.sparse.values().max()) < 50
    assert batch.dense.shape == (4, 13)


def test_ranks_share_every_global_batch(tmp_path):
    path = tsv(tmp_path, 19)
    parts = [readers(path, rank=rank, world_size=2)[0] for rank in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    steps = zip(*parts, strict=True)
    assert [label for step in steps for batch in step for label in batch.labels.tolist()] == \
        [float(row % 3 == 0) for row in range(19)]


def test_a_copy_with_another_start_continues_there(tmp_path):
    train, _ = readers(tsv(tmp_path, 20))
    rest = copy(train)
    rest.start = 8
    assert len(rest) == 3
    assert labels(rest) == labels(train)[8:]


def test_bad_rows_can_be_skipped(tmp_path):
    train, _ = readers(tsv(tmp_path, 20, bad=(3, 11)), "data.on_bad_row=skip")
    assert [len(batch) for batch in train] == [3, 4, 3, 4, 4]
    assert len(labels(train)) == 18


def test_a_bad_row_is_named_by_file_and_line(tmp_path):
    train, _ = readers(tsv(tmp_path, 20, bad=(11,)))
    with pytest.raises(DataError, match=r"clicks\.tsv, line 12: "):
        labels(train)


def test_mapped_features_read_their_column(tmp_path):
    table = "{name: t, num_embeddings: 1000003, embedding_dim: 4, feature_names: [a, C2]}"
    train, _ = readers(tsv(tmp_path, 8), f"tables=[{table}]", "data.columns.sparse={a: C2}")
    batch = next(iter(train))
    assert batch.sparse.keys() == ["a", "C2"]
    assert batch.sparse["a"].values().tolist() == batch.sparse["C2"].values().tolist()
