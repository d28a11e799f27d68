"""Hashes: equal to the published constants, stable, evenly spread, and without a Python twin."""

from __future__ import annotations

import numpy as np
import pytest

from shardlab.data.hashing import hash_bytes, rows_of, splitmix64
from tests.shardlab.data.criteo_rows import place, splitmix


def as_bytes(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.array([len(text) for text in strings], np.int64)
    starts = np.concatenate(([0], np.cumsum(lengths)))[:-1].astype(np.int64)
    return np.frombuffer(b"".join(strings), np.uint8), starts, lengths


def test_splitmix64_equals_the_published_sequence() -> None:
    # First outputs of the reference generator from state 1234567.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * gamma) % 2**64 for i in range(3)], np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973,
                                           9817491932198370423]


def test_splitmix64_leaves_its_input_alone() -> None:
    x = np.arange(-3, 5, dtype=np.int64)
    assert splitmix64(x).tolist() == [splitmix(v % 2**64) for v in range(-3, 5)]
    assert x.tolist() == list(range(-3, 5))


@pytest.mark.parametrize("rows", [1, 2, 3, 1000, 2**31 + 1, 2**32 + 1], ids=lambda r: f"rows={r}")
def test_rows_of_keeps_row_0_for_missing(rows: int) -> None:
    found = rows_of(splitmix64(np.arange(5000)), rows)
    assert found.dtype == np.int64
    assert found.max() < rows
    assert found.min() >= min(1, rows - 1)
    if rows == 1000:
        assert found[:100].tolist() == [place(splitmix(v), rows) for v in range(100)]


def test_rows_of_spreads_evenly() -> None:
    counts = np.bincount(rows_of(splitmix64(np.arange(90_000)), 10), minlength=10)
    assert counts[0] == 0
    # 10,000 expected in each; six standard deviations of a binomial count are below 600.
    assert np.abs(counts[1:] - 10_000).max() < 600


def test_hash_bytes_depends_on_every_byte_and_the_length() -> None:
    base = bytes(range(1, 20))
    variants = [base[:n] for n in range(20)] + [b"\0" * n for n in range(20)]
    variants += [base[:i] + b"\xff" + base[i + 1:] for i in range(19)]
    found = hash_bytes(*as_bytes(variants))
    assert len(set(found.tolist())) == len(set(variants))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 17], ids=lambda s: f"bytes={s}")
def test_hash_bytes_does_not_see_its_neighbours(size: int) -> None:
    text = b"abcdefghijklmnopqrst"[:size]
    alone = hash_bytes(*as_bytes([text]))
    among = hash_bytes(*as_bytes([b"\xffxy", text, b"\xffthe end", b"", text]))
    assert among[1] == among[4] == alone[0]
    chain = splitmix(size)
    for at in range(0, size, 8):
        chain = splitmix(chain ^ int.from_bytes(text[at:at + 8], "little"))
    assert alone[0] == chain


def test_hash_bytes_of_no_string() -> None:
    assert len(hash_bytes(*as_bytes([]))) == 0
