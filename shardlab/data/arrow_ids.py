"""Columns of Arrow arrays as ids, labels and dense values, without a loop over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shardlab.data.digits import HEX_DIGITS, parse_hex
from shardlab.data.hashing import (
    MISSING_ID,
    U64,
    hash_bytes,
    rows_of,
    splitmix64,
    unaligned_words,
)
from shardlab.data.rows import Bags

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class IdRule:
    """How a column's values become rows of a table.

    Attributes:
        rows: rows of the table.
        hex_strings: strings are 8 hexadecimal digits, hashed by their value as the raw Criteo
            reader does; otherwise strings are hashed by their bytes.
        raw_integers: integers are rows already and stay as they are.
    """

    rows: int
    hex_strings: bool = False
    raw_integers: bool = False


def is_string(kind: pa.DataType) -> bool:
    """Strings and bytes, plain or large."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or \
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_list(kind: pa.DataType) -> bool:
    """Lists with sizes of their own."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def is_categorical(kind: pa.DataType) -> bool:
    """Whether `read_bags` takes a column of this type."""
    if is_list(kind):
        return is_categorical(kind.value_type) and not is_list(kind.value_type)
    if pa.types.is_dictionary(kind):
        return is_categorical(kind.value_type)
    return is_string(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether `read_numbers` takes a column of this type."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def read_numbers(column: pa.Array, missing: float) -> NDArray[np.float32]:
    """[n] a numeric column, with nulls and NaN as ``missing``."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    null = not_valid(column)
    if null is not None:
        column = column.fill_null(0)
    numbers = column.to_numpy(zero_copy_only=False).astype(np.float32)
    if null is not None:
        numbers[null] = missing
    numbers[np.isnan(numbers)] = missing
    return numbers


def read_bags(column: pa.Array, rule: IdRule) -> tuple[Bags, Bools | None]:
    """The bags of a column.

    A scalar is a bag of one id; a missing one is `MISSING_ID`, or, with raw integers, an empty
    bag. A list is a bag; a missing list is an empty bag, and missing entries are left out.

    Args:
        column: [n] strings, integers, or lists of them, dictionary-encoded or not.
        rule: how values become rows.

    Returns:
        The bags, and which rows hold a string that is not hexadecimal (None: no row).
    """
    if is_list(column.type):
        return _read_lists(column, rule)
    if rule.raw_integers and not _holds_strings(column.type):
        null = not_valid(column)
        if null is None:
            return Bags(_integers(column)), None
        return Bags(_integers(column.drop_null()), (~null).astype(np.int64)), None
    ids, bad = _read_scalars(column, rule)
    return Bags(ids), bad


def not_valid(column: pa.Array) -> Bools | None:
    """[n] which entries are null; None where none is."""
    if not column.null_count:
        return None
    return column.is_null().to_numpy(zero_copy_only=False)


def _holds_strings(kind: pa.DataType) -> bool:
    return is_string(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _read_lists(column: pa.Array, rule: IdRule) -> tuple[Bags, Bools | None]:
    offsets = column.offsets.to_numpy()
    entries = column.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    lengths = np.diff(offsets).astype(np.int64)
    owner = np.repeat(np.arange(len(column)), lengths)
    # Arrow lets a null list span entries: they are no part of it.
    null_list, null_entry = not_valid(column), not_valid(entries)
    if null_list is not None or null_entry is not None:
        kept = np.ones(len(entries), np.bool_) if null_entry is None else ~null_entry
        if null_list is not None:
            kept &= ~null_list[owner]
        entries, owner = entries.filter(pa.array(kept)), owner[kept]
        lengths = np.bincount(owner, minlength=len(column))
    flat, bad = read_bags(entries, rule)
    if bad is None:
        return Bags(flat.values, lengths), None
    return Bags(flat.values, lengths), np.bincount(owner, bad, len(column)) > 0


def _read_scalars(column: pa.Array, rule: IdRule) -> tuple[NDArray[np.int64], Bools | None]:
    if pa.types.is_dictionary(column.type):
        if not is_string(column.type.value_type):
            return _read_scalars(column.dictionary_decode(), rule)
        return _read_dictionary(column, rule)
    null = not_valid(column)
    if is_string(column.type):
        hashes, bad = _hash_strings(*_spans(column), rule)
    else:
        hashes, bad = splitmix64(_integers(column if null is None else column.fill_null(0))), None
    ids = rows_of(hashes, rule.rows)
    if null is not None:
        ids[null] = MISSING_ID
        bad = None if bad is None else bad & ~null
    return ids, bad


def _read_dictionary(column: pa.Array, rule: IdRule) -> tuple[NDArray[np.int64], Bools | None]:
    """Hashes each distinct string once; where few are used, only those."""
    data, starts, lengths = _spans(column.dictionary)
    null = len(starts)  # nulls read the entry behind the last string
    indices = column.indices if not column.null_count else column.indices.fill_null(null)
    places = indices.to_numpy()
    if null > len(places):
        used, places = np.unique(places, return_inverse=True)
        used = used[used < null]  # in order: what is left behind them is the null, if any
        starts, lengths = starts[used], lengths[used]
    hashes, bad = _hash_strings(data, starts, lengths, rule)
    ids = np.append(rows_of(hashes, rule.rows), MISSING_ID)[places]
    return ids, None if bad is None else np.append(bad, False)[places]


def _hash_strings(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64],
                  rule: IdRule) -> tuple[U64, Bools | None]:
    if not rule.hex_strings:
        return hash_bytes(data, starts, lengths), None
    bad = lengths != HEX_DIGITS
    words = unaligned_words(data)
    if not len(words):
        return np.zeros(len(starts), np.uint64), bad
    values, valid = parse_hex(words[np.where(bad, 0, starts)])
    bad |= ~valid
    return splitmix64(values), bad if bad.any() else None


def _spans(column: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Bytes of a string column, where each string begins, and its length."""
    large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
    _, where, data = column.buffers()
    if not len(column):
        offsets = np.zeros(1, np.int64)
    else:
        kind = np.dtype(np.int64 if large else np.int32)
        offsets = np.frombuffer(where, kind, len(column) + 1,
                                column.offset * kind.itemsize).astype(np.int64)
    # Words are loaded at starts + 8k; rebasing keeps a slice's cost at the slice's size.
    first, last = int(offsets[0]), int(offsets[-1])
    held = np.empty(0, np.uint8) if data is None else \
        np.frombuffer(data, np.uint8, last - first, first)
    offsets -= first
    return held, offsets[:-1], np.diff(offsets)


def _integers(column: pa.Array) -> NDArray[np.int64]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False)
