"""Arrow columns as bags: every type gives the hash of its value, sliced or not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from shardlab.data.arrow_ids import IdRule, is_categorical, read_bags, read_numbers
from shardlab.data.hashing import hash_bytes
from tests.shardlab.data.criteo_rows import place, splitmix

ROWS = 1000


def byte_id(text: str) -> int:
    data = np.frombuffer(text.encode(), np.uint8)
    return place(int(hash_bytes(data, np.zeros(1, np.int64), np.array([len(data)]))[0]), ROWS)


STRINGS = ["a", None, "", "a longer string", "é", "a", "x" * 40]
STRING_IDS = [0 if text is None else byte_id(text) for text in STRINGS]
INTEGERS = [5, None, -1, 2**40, 5, 0, 7]
INTEGER_IDS = [0 if v is None else place(splitmix(v % 2**64), ROWS) for v in INTEGERS]
STRING_TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(),
                pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]


def shifted(values: list, kind: pa.DataType) -> pa.Array:
    """The values as a slice out of a longer array."""
    return pa.array([None, *values, values[0]], kind).slice(1, len(values))


@pytest.mark.parametrize("build", [pa.array, shifted], ids=["whole", "slice"])
@pytest.mark.parametrize("kind", STRING_TYPES, ids=str)
def test_strings_are_hashed_by_their_bytes(kind: pa.DataType, build) -> None:
    bags, bad = read_bags(build(STRINGS, kind), IdRule(ROWS))
    assert bags.lengths is None
    assert bad is None
    assert bags.values.tolist() == STRING_IDS


@pytest.mark.parametrize("build", [pa.array, shifted], ids=["whole", "slice"])
@pytest.mark.parametrize("kind", [pa.int64(), pa.dictionary(pa.int32(), pa.int64())], ids=str)
def test_integers_are_hashed_or_raw(kind: pa.DataType, build) -> None:
    column = build(INTEGERS, kind)
    assert read_bags(column, IdRule(ROWS))[0].values.tolist() == INTEGER_IDS
    raw, _ = read_bags(column, IdRule(ROWS, raw_integers=True))
    assert raw.values.tolist() == [v for v in INTEGERS if v is not None]
    assert raw.lengths is not None
    assert raw.lengths.tolist() == [int(v is not None) for v in INTEGERS]


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint32(), pa.bool_()],
                         ids=str)
def test_width_of_integers_does_not_matter(kind: pa.DataType) -> None:
    column = pa.array([1, 0, 1], pa.int64()).cast(kind)
    assert read_bags(column, IdRule(ROWS))[0].values.tolist() == \
        [place(splitmix(v), ROWS) for v in (1, 0, 1)]
    raw, _ = read_bags(column, IdRule(ROWS, raw_integers=True))
    assert (raw.values.tolist(), raw.lengths) == ([1, 0, 1], None)


def test_dictionary_longer_than_its_use() -> None:
    words = pa.array([f"word {i}" for i in range(50)])
    column = pa.DictionaryArray.from_arrays(pa.array([7, None, 49, 7], pa.int32()), words)
    found, _ = read_bags(column, IdRule(ROWS))
    assert found.values.tolist() == [byte_id("word 7"), 0, byte_id("word 49"), byte_id("word 7")]


@pytest.mark.parametrize("dictionary", [False, True], ids=["plain", "dictionary"])
@pytest.mark.parametrize("values", [["0000000a", None, "zz", "0000000A"], ["12", None], [None],
                                    ["0123456g", "01234567"]], ids=str)
def test_hex_strings_mark_what_is_not_hex(values: list, dictionary: bool) -> None:
    column = pa.array(values, pa.string())
    column = column.dictionary_encode() if dictionary else column
    bags, bad = read_bags(column, IdRule(ROWS, hex_strings=True))
    sound = [v is None or (len(v) == 8 and v.strip("0123456789abcdefABCDEF") == "")
             for v in values]
    assert (np.zeros(len(values), bool) if bad is None else bad).tolist() == \
        [not good for good in sound]
    expected = [0 if v is None else place(splitmix(int(v, 16)), ROWS)
                for v, good in zip(values, sound, strict=True) if good]
    assert bags.values[sound].tolist() == expected


LISTS = [[5, None, -1], None, [], [2**40], [None]]
KEPT = [[v for v in bag or [] if v is not None] for bag in LISTS]


@pytest.mark.parametrize("build", [pa.array, shifted], ids=["whole", "slice"])
@pytest.mark.parametrize("raw", [False, True], ids=["hashed", "raw"])
@pytest.mark.parametrize("make", [pa.list_, pa.large_list], ids=["list", "large_list"])
def test_lists_are_bags(make, raw: bool, build) -> None:
    bags, _ = read_bags(build(LISTS, make(pa.int64())), IdRule(ROWS, raw_integers=raw))
    assert bags.lengths is not None
    assert bags.lengths.tolist() == [len(bag) for bag in KEPT]
    flat = [v for bag in KEPT for v in bag]
    assert bags.values.tolist() == \
        (flat if raw else [place(splitmix(v % 2**64), ROWS) for v in flat])


def test_null_list_over_entries_is_empty() -> None:
    column = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), pa.array([1, 2, 3]),
                                      mask=pa.array([True, False]))
    bags, _ = read_bags(column, IdRule(ROWS, raw_integers=True))
    assert bags.values.tolist() == [3]
    assert bags.lengths.tolist() == [0, 1]


def test_lists_of_strings() -> None:
    column = pa.array([["a", "é"], [], ["zz", None]], pa.list_(pa.string()))
    bags, _ = read_bags(column, IdRule(ROWS))
    assert bags.values.tolist() == [byte_id(text) for text in ("a", "é", "zz")]
    assert bags.lengths.tolist() == [2, 0, 1]
    _, bad = read_bags(column, IdRule(ROWS, hex_strings=True))
    assert bad.tolist() == [True, False, True]


@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.list_(pa.int64()),
                                  pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_no_row(kind: pa.DataType) -> None:
    bags, bad = read_bags(pa.array([], kind), IdRule(ROWS))
    assert len(bags.values) == len(bags.sizes()) == 0
    assert bad is None


@pytest.mark.parametrize("kind", [pa.float32(), pa.timestamp("s"), pa.list_(pa.list_(pa.int8())),
                                  pa.struct([("a", pa.int8())])], ids=str)
def test_other_types_are_not_categorical(kind: pa.DataType) -> None:
    assert not is_categorical(kind)


@pytest.mark.parametrize(("column", "expected"), [
    (pa.array([1, None, -2], pa.int8()), [1, 9, -2]),
    (pa.array([True, None, False]), [1, 9, 0]),
    (pa.array([0.5, None, float("nan")], pa.float64()), [0.5, 9, 9]),
    (pa.array([float("inf")], pa.float32()), [float("inf")]),
    (pa.array([], pa.int64()), []),
], ids=["int", "bool", "float", "infinite", "empty"])
def test_read_numbers(column: pa.Array, expected: list[float]) -> None:
    found = read_numbers(column, missing=9)
    assert found.dtype == np.float32
    assert found.tolist() == expected
