"""Raw Criteo lines: equal to parsing row by row, and every malformed line is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shardlab.data import CriteoTsvSource, Reader
from shardlab.errors import DataError
from shardlab.presets import CRITEO_DENSE_NAMES, CRITEO_SPARSE_NAMES
from tests.shardlab.data.criteo_rows import FEATURES, check_batch, make_rows, write_tsv


@pytest.mark.parametrize(("end", "last_end"), [("\n", True), ("\n", False), ("\r\n", True)],
                         ids=["lf", "no last line end", "crlf"])
@pytest.mark.parametrize("count", [1, 37], ids=lambda c: f"rows={c}")
def test_rows_equal_plain_parsing(tmp_path: Path, count: int, end: str, last_end: bool) -> None:
    rows = make_rows(count)
    source = CriteoTsvSource(write_tsv(tmp_path / "a.tsv", rows, end, last_end), FEATURES)
    assert source.num_rows() == count
    batches = list(Reader(source, 10))
    for i, batch in enumerate(batches):
        check_batch(batch, rows[10 * i:10 * (i + 1)])
    assert batches[-1].position == count
    assert batches[0].sparse.fixed_length == 1


def test_all_missing_and_upper_case(tmp_path: Path) -> None:
    rows = [["0"] + [""] * 39, ["1"] + ["-1"] * 13 + ["00ABCDEF"] * 26]
    (batch,) = Reader(CriteoTsvSource(write_tsv(tmp_path / "a.tsv", rows), FEATURES), 2)
    check_batch(batch, rows)
    assert not batch.dense.any()


def test_features_in_any_order_and_under_other_names(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", make_rows(5))
    (whole,) = Reader(CriteoTsvSource(path, FEATURES), 5)
    chosen = {"C9": FEATURES["C9"], "user": FEATURES["C3"]}
    (batch,) = Reader(CriteoTsvSource(path, chosen, {"user": "C3"}), 5)
    assert batch.sparse.keys() == ["C9", "user"]
    for name, column in (("C9", "C9"), ("user", "C3")):
        assert batch.sparse[name].values().tolist() == whole.sparse[column].values().tolist()


def test_no_feature_at_all(tmp_path: Path) -> None:
    source = CriteoTsvSource(write_tsv(tmp_path / "a.tsv", make_rows(3)), {})
    (batch,) = Reader(source, 3)
    assert batch.sparse.stride() == len(batch) == 3


def test_empty_file(tmp_path: Path) -> None:
    source = CriteoTsvSource(write_tsv(tmp_path / "a.tsv", []), FEATURES)
    assert list(Reader(source, 3)) == []


def corrupt(field: int, value: str) -> list[str]:
    row = make_rows(1, seed=9)[0]
    row[field] = value
    return row


C1 = 14
BAD = {
    "truncated": (make_rows(1)[0][:30], "expected 40 tab-separated fields, found 30 in '"),
    "too long": ([*make_rows(1)[0], "x"], "expected 40 tab-separated fields, found 41"),
    "blank": ([""], "expected 40 tab-separated fields, found 1 in ''"),
    "label": (corrupt(0, "2"), "label: expected 0 or 1, found '2'"),
    "no label": (corrupt(0, ""), "label: expected 0 or 1, found ''"),
    "two labels": (corrupt(0, "01"), "label: expected 0 or 1, found '01'"),
    "letters": (corrupt(1, "12x"), "I1: expected an integer of at most 16 digits.*found '12x'"),
    "float": (corrupt(13, "1.5"), "I13: expected an integer.*found '1.5'"),
    "endless": (corrupt(5, "1" * 40), r"I5: expected an integer.*found '1{24}'\.\.\."),
    "sign": (corrupt(2, "-"), "I2: expected an integer"),
    "short hex": (corrupt(C1, "1234567"), "C1: expected 8 hex digits or nothing, found '1234567'"),
    "long hex": (corrupt(C1 + 25, "123456789"), "C26: expected 8 hex digits"),
    "no hex": (corrupt(C1 + 2, "1234567g"), "C3: expected 8 hex digits or nothing, found '12345"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_line_is_named(tmp_path: Path, name: str) -> None:
    bad, text = BAD[name]
    good = make_rows(6)
    first = write_tsv(tmp_path / "a.tsv", good[:2])
    second = write_tsv(tmp_path / "b.tsv", [*good[2:5], bad, good[5]])
    source = CriteoTsvSource([str(first), str(second)], FEATURES)
    reader = iter(Reader(source, 2))
    check_batch(next(reader), good[:2])
    check_batch(next(reader), good[2:4])
    with pytest.raises(DataError, match=rf"b\.tsv, line 4: {text}"):
        next(reader)


@pytest.mark.parametrize("name", list(BAD))
def test_bad_line_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    good = make_rows(5)
    rows = [*good[:2], BAD[name][0], *good[2:], BAD[name][0]]
    source = CriteoTsvSource(write_tsv(tmp_path / "a.tsv", rows), FEATURES, on_bad_row="skip")
    reader = Reader(source, 4)
    batches = list(reader)
    assert reader.skipped == 2
    assert [batch.position for batch in batches] == [4, 7]
    check_batch(batches[0], good[:3])
    check_batch(batches[1], good[3:])


def test_only_bad_lines_leave_empty_batches(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [["x"], ["y"]])
    reader = Reader(CriteoTsvSource(path, FEATURES, on_bad_row="skip"), 1)
    assert [len(batch) for batch in reader] == [0, 0]
    assert reader.skipped == 2


def test_unknown_column_is_refused(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [])
    with pytest.raises(DataError, match=r"feature 'C27' asks for column 'C27'.*did you mean 'C"):
        CriteoTsvSource(path, {"C27": 5})


def test_real_head(shared_data: Path) -> None:
    path = shared_data / "criteo_kaggle_head_7k.tsv"
    batches = list(Reader(CriteoTsvSource(path, FEATURES), 1000))
    lines = path.read_text().split("\n")
    rows = [line.split("\t") for line in lines if line]
    assert sum(map(len, batches)) == len(rows) == 7200
    for i, batch in enumerate(batches):
        check_batch(batch, rows[1000 * i:1000 * (i + 1)])
    assert batches[0].dense.shape[1] == len(CRITEO_DENSE_NAMES)
    assert len(batches[0].sparse.keys()) == len(CRITEO_SPARSE_NAMES)
    assert math.isclose(sum(float(b.labels.sum()) for b in batches),
                        sum(row[0] == "1" for row in rows))


def test_real_head_cut_within_a_line(shared_data: Path, tmp_path: Path) -> None:
    content = (shared_data / "criteo_kaggle_head_7k.tsv").read_bytes()
    cut = tmp_path / "cut.tsv"
    cut.write_bytes(content[:-100])
    source = CriteoTsvSource(cut, FEATURES)
    with pytest.raises(DataError, match=r"cut\.tsv, line 7200: expected 40 tab-separated fields"):
        list(Reader(source, 1000))
    reader = Reader(CriteoTsvSource(cut, FEATURES, on_bad_row="skip"), 1000)
    assert sum(map(len, reader)) == 7199
    assert reader.skipped == 1
