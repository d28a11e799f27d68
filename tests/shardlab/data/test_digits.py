"""Eight-character parsing: equal to int() on numbers, and refuses everything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.data.digits import PADDING, parse_decimal, parse_hex

HEX = b"0123456789abcdefABCDEF"


def decimals(fields: list[bytes], around: bytes = b"7") -> tuple[list[int], list[bool]]:
    data = around * PADDING + b"\t".join(fields) + around * PADDING
    ends = np.cumsum([len(field) + 1 for field in fields], dtype=np.int64) + PADDING - 1
    starts = ends - np.array([len(field) for field in fields], np.int64)
    values, valid = parse_decimal(np.frombuffer(data, np.uint8), starts, ends)
    return values.tolist(), valid.tolist()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.booleans())
def test_parse_hex_equals_int(values: list[int], upper: bool) -> None:
    text = "".join(f"{value:08X}" if upper else f"{value:08x}" for value in values).encode()
    found, valid = parse_hex(np.frombuffer(text, "<u8"))
    assert found.tolist() == values
    assert valid.all()


@pytest.mark.parametrize("position", range(8))
def test_parse_hex_refuses_every_other_character(position: int) -> None:
    wrong = [code for code in range(256) if code not in HEX]
    words = np.frombuffer(b"".join(
        b"12ab89cF"[:position] + bytes([code]) + b"12ab89cF"[position + 1:] for code in wrong),
        "<u8")
    assert not parse_hex(words)[1].any()


@given(st.lists(st.integers(-10**16 + 1, 10**16 - 1), min_size=1, max_size=20))
def test_parse_decimal_equals_int(values: list[int]) -> None:
    found, valid = decimals([str(value).encode() for value in values])
    assert found == values
    assert all(valid)


def test_parse_decimal_edges() -> None:
    good = [b"", b"0", b"-0", b"-1", b"00012", b"99999999", b"100000000", b"9" * 16,
            b"-" + b"9" * 16]
    values, valid = decimals(good)
    assert values == [int(field or b"0") for field in good]
    assert all(valid)


@pytest.mark.parametrize("field", [
    b"-", b"--1", b"1-", b"+1", b" 1", b"1.5", b"1e3", b"abc", b"0x1", b"1" * 17, b"\xff", b"/",
    b":", b"1x345678", b"x2345678", b"1x34567890", b"123456789x",
], ids=repr)
def test_parse_decimal_refuses(field: bytes) -> None:
    _, valid = decimals([b"5", field, b"6"])
    assert valid == [True, False, True]


def test_parse_decimal_of_no_field() -> None:
    assert decimals([]) == ([], [])
