"""Parquet files: Criteo's layout and any other, over row groups and files, and broken ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shardlab.data import CRITEO_PARQUET, CriteoTsvSource, ParquetColumns, ParquetSource, Reader
from shardlab.data import parquet as parquet_module
from shardlab.errors import DataError
from tests.shardlab.data.criteo_rows import (
    FEATURES,
    check_batch,
    flat,
    make_rows,
    write_parquet,
    write_tsv,
)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_module, "CHUNK_ROWS", 6)


@pytest.mark.usefixtures("small_chunks")
def test_criteo_rows_equal_plain_parsing(tmp_path: Path) -> None:
    rows = make_rows(60)
    write_parquet(tmp_path / "b.parquet", rows[35:], row_group_size=10)
    write_parquet(tmp_path / "a.parquet", rows[:35], row_group_size=17)
    write_parquet(tmp_path / "aa.parquet", [])
    source = ParquetSource(f"{tmp_path}/*.parquet", FEATURES, CRITEO_PARQUET)
    assert source.num_rows() == 60
    batches = list(Reader(source, 13))
    for i, batch in enumerate(batches):
        check_batch(batch, rows[13 * i:13 * (i + 1)])
    assert batches[0].sparse.fixed_length == 1


def test_same_ids_from_tsv_and_parquet(tmp_path: Path) -> None:
    rows = make_rows(40, seed=4)
    path = write_parquet(tmp_path / "b", rows)
    tsv = Reader(CriteoTsvSource(write_tsv(tmp_path / "a", rows), FEATURES), 16)
    parquet = Reader(ParquetSource(path, FEATURES, CRITEO_PARQUET), 16)
    for left, right in zip(flat(list(tsv)), flat(list(parquet)), strict=True):
        assert torch.equal(left, right)


def write_general(path: Path) -> Path:
    pq.write_table(pa.table({
        "clicked": pa.array([True, False, True, False]),
        "price": pa.array([1.5, None, -2.0, float("nan")], pa.float64()),
        "age": pa.array([3, 4, None, 6], pa.int16()),
        "user": pa.array([1, 2, None, 1], pa.int32()),
        "query": pa.array([["red", "shoe"], [], None, ["red"]], pa.list_(pa.string())),
        "color": pa.array(["red", "blue", None, "red"]).dictionary_encode(),
        "note": pa.array([{"a": 1}] * 4),
    }), path, row_group_size=3)
    return path


def test_any_layout_with_lists(tmp_path: Path) -> None:
    columns = ParquetColumns("clicked", ("age", "price"), {"word": "query"})
    features = {"color": 100, "word": 100, "user": 50}
    source = ParquetSource(write_general(tmp_path / "a"), features, columns)
    (batch,) = Reader(source, 4)
    assert batch.labels.tolist() == [1, 0, 1, 0]
    assert batch.dense.tolist() == [[3, 1.5], [4, 0], [0, -2], [6, 0]]
    assert batch.sparse.keys() == list(features)
    assert batch.sparse.fixed_length is None
    assert batch.sparse["word"].lengths().tolist() == [2, 0, 0, 1]
    red = int(batch.sparse["color"].values()[0])
    assert batch.sparse["color"].values().tolist()[2:] == [0, red]
    # The same string has the same hash, alone and in a list.
    assert batch.sparse["word"].values().tolist()[::2] == [red, red]
    user = batch.sparse["user"].values().tolist()
    assert user[0] == user[3] != 0
    assert user[2] == 0


def test_raw_integers_and_log_dense(tmp_path: Path) -> None:
    columns = ParquetColumns("clicked", ("price",), log_dense=True, raw_integers=True)
    source = ParquetSource(write_general(tmp_path / "a"), {"user": 3}, columns)
    (batch,) = Reader(source, 4)
    assert batch.sparse["user"].values().tolist() == [1, 2, 1]
    assert batch.sparse["user"].lengths().tolist() == [1, 1, 0, 1]
    torch.testing.assert_close(batch.dense[:, 0], torch.tensor([2.5, 1, 1, 1]).log())


def test_neither_dense_nor_sparse(tmp_path: Path) -> None:
    source = ParquetSource(write_general(tmp_path / "a"), {}, ParquetColumns("clicked"))
    (batch,) = Reader(source, 4)
    assert batch.dense.shape == (4, 0)
    assert batch.sparse.stride() == 4


@pytest.mark.parametrize(("columns", "features", "text"), [
    (ParquetColumns("click"), {}, r"no column 'click' \(did you mean 'clicked'\?\); it has 7: cli"),
    (ParquetColumns("clicked", ("prize",)), {}, r"no column 'prize' \(did you mean 'price'"),
    (ParquetColumns("clicked"), {"C27": 5}, r"a\.parquet: no column 'C27'; it has 7: clicked, "),
    (ParquetColumns("color"), {}, r"column 'color' must hold numbers, found dictionary"),
    (ParquetColumns("clicked", ("query",)), {}, r"column 'query' must hold numbers, found list"),
    (ParquetColumns("clicked"), {"price": 5}, r"column 'price' of feature 'price' must hold strin"),
    (ParquetColumns("clicked", (), {"f": "note"}), {"f": 5}, r"'note' of feature 'f'.*struct"),
], ids=["label", "dense", "sparse", "label type", "dense type", "float ids", "struct ids"])
def test_missing_or_wrong_columns_are_named(tmp_path: Path, columns: ParquetColumns,
                                            features: dict[str, int], text: str) -> None:
    with pytest.raises(DataError, match=text):
        ParquetSource(write_general(tmp_path / "a.parquet"), features, columns)


def test_column_missing_in_a_later_file(tmp_path: Path) -> None:
    rows = make_rows(3)
    write_parquet(tmp_path / "a", rows)
    table = pq.read_table(write_parquet(tmp_path / "b", rows))
    pq.write_table(table.drop_columns(["C7"]), tmp_path / "b")
    with pytest.raises(DataError, match="b: no column 'C7'"):
        ParquetSource(f"{tmp_path}/*", FEATURES, CRITEO_PARQUET)


@pytest.mark.parametrize("content", [b"", b"label\tI1\n", b"PAR1" + b"\0" * 100 + b"PAR1"],
                         ids=["empty", "text", "no footer"])
def test_not_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file: "):
        ParquetSource(tmp_path / "bad.parquet", FEATURES, CRITEO_PARQUET)


def test_file_that_vanished_or_shrank(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_rows(20), row_group_size=20)
    source = ParquetSource(path, FEATURES, CRITEO_PARQUET)
    write_parquet(path, make_rows(15))
    with pytest.raises(DataError, match="row group 0: ends before row 15; has the file changed"):
        list(Reader(source, 20))
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file: "):
        list(Reader(source, 20))


def test_torn_row_group_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "torn.parquet", make_rows(200), row_group_size=100)
    second = pq.ParquetFile(path).metadata.row_group(1).column(20)
    content = bytearray(path.read_bytes())
    begin = second.dictionary_page_offset
    content[begin:begin + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    path.write_bytes(content)
    reader = iter(Reader(ParquetSource(path, FEATURES, CRITEO_PARQUET), 100))
    assert len(next(reader)) == 100
    with pytest.raises(DataError, match=r"torn\.parquet, row group 1: cannot be read: "):
        next(reader)


def edited(path: Path, column: str, values: list, kind: pa.DataType) -> Path:
    table = pq.read_table(write_parquet(path, make_rows(20)))
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, column, pa.array(values, kind)), path, row_group_size=8)
    return path


BAD = {
    "label": ("label", [0] * 10 + [2] + [1] * 9, pa.int8(), "'label': expected 0 or 1, found 2"),
    "no label": ("label", [0] * 10 + [None] + [1] * 9, pa.int8(), "expected 0 or 1, found None"),
    "infinite": ("I3", [0.0] * 10 + [float("inf")] + [1.0] * 9, pa.float64(),
                 "'I3': expected a finite number, found inf"),
    "hex": ("C5", ["00000000"] * 10 + ["0000000x"] + [None] * 9, pa.string(),
            "'C5': expected 8 hex digits, found '0000000x'"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_row_is_named(tmp_path: Path, name: str) -> None:
    column, values, kind, text = BAD[name]
    source = ParquetSource(edited(tmp_path / "a.parquet", column, values, kind), FEATURES,
                           CRITEO_PARQUET)
    place = r"a\.parquet, row group 1, row 2 of it \(row 10 of the file\): column "
    with pytest.raises(DataError, match=place + f".*{text}"):
        list(Reader(source, 4))
    # Rows that are not asked for do not matter.
    assert sum(map(len, Reader(source, 4, stop=10))) == 10
    assert sum(map(len, Reader(source, 4, start=11))) == 9


@pytest.mark.parametrize("name", list(BAD))
def test_bad_row_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    column, values, kind, _ = BAD[name]
    path = edited(tmp_path / "a.parquet", column, values, kind)
    source = ParquetSource(path, FEATURES, CRITEO_PARQUET, on_bad_row="skip")
    readers = [Reader(source, 3, rank=rank, world_size=2) for rank in range(2)]
    sizes = [[len(batch) for batch in reader] for reader in readers]
    assert sizes == [[3, 3, 3, 1], [3, 2, 3, 1]]
    assert [reader.skipped for reader in readers] == [0, 1]


def test_bad_row_of_lists_is_skipped(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [0, 7, 1], "tags": [[1, 2], [3, 4, 5], [6]]}), tmp_path / "a")
    source = ParquetSource(tmp_path / "a", {"tags": 9}, ParquetColumns(raw_integers=True), "skip")
    (batch,) = Reader(source, 3)
    assert batch.sparse["tags"].values().tolist() == [1, 2, 6]
    assert batch.sparse["tags"].lengths().tolist() == [2, 1]


def test_lists_over_chunks_and_ranks(tmp_path: Path, small_chunks: None) -> None:
    rng = np.random.default_rng(0)
    bags = [rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(31)]
    pq.write_table(pa.table({"label": [0] * 31, "tags": pa.array(bags, pa.list_(pa.int64()))}),
                   tmp_path / "a", row_group_size=13)
    source = ParquetSource(tmp_path / "a", {"tags": 9}, ParquetColumns(raw_integers=True))
    ranks = [list(Reader(source, 4, rank=rank, world_size=2)) for rank in range(2)]
    found = [bag.tolist() for step in zip(*ranks, strict=True) for batch in step
             for bag in batch.sparse["tags"].to_dense()]
    assert found == bags


def test_real_sample(shared_data: Path) -> None:
    path = shared_data / "criteo_kaggle_123k.parquet"
    source = ParquetSource(path, FEATURES, CRITEO_PARQUET)
    assert source.num_rows() == 123_425
    labels, dense, ids = flat(list(Reader(source, 4096)))
    table = pq.read_table(path)
    for row in (0, 1, 16_384, 60_000, 123_424):
        one = table.slice(row, 1).to_pylist()[0].values()
        fields = ["" if value is None else str(value) for value in one]
        (batch,) = Reader(source, 1, start=row, stop=row + 1)
        check_batch(batch, [fields])
        assert torch.equal(batch.sparse.values(), ids[row])
        assert torch.equal(batch.dense[0], dense[row])
    assert round(float(labels.mean()), 3) == 0.256


def test_real_frappe_with_raw_ids(shared_data: Path) -> None:
    path = shared_data / "frappe_nfm_86k.parquet"
    features = {f"F{i}": 5382 for i in range(1, 11)}
    source = ParquetSource(path, features, ParquetColumns(raw_integers=True))
    batches = list(Reader(source, 8192))
    table = pq.read_table(path)
    _, _, ids = flat(batches)
    expected = np.stack([table[name].to_numpy() for name in features], axis=1)
    assert np.array_equal(ids.numpy(), expected)
