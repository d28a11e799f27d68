"""Stable, vectorised hashes of categorical values, and where they fall in a table.

The same value gets the same row in every run, on every machine, and from every file format.
Features that share a table agree on a value's row, because nothing but the value is hashed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

#: Row of a missing value; present values take the other rows.
MISSING_ID = 0

# Increment and multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = 8
#: KEEP[n] keeps the n low bytes of a little-endian word.
_KEEP = np.array([(1 << (8 * n)) - 1 for n in range(_WORD + 1)], dtype=np.uint64)


def splitmix64(x: NDArray[np.integer]) -> U64:
    """Mixes each 64-bit number; a bijection whose output bits all depend on all input bits.

    Args:
        x: integers of any shape, 8 bytes each.

    **Source:** Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    z = np.add(x.view(np.uint64), np.uint64(GAMMA))
    shifted = np.right_shift(z, np.uint64(30))
    z ^= shifted
    z *= _MIX_1
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= _MIX_2
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z


def rows_of(hashes: U64, rows: int) -> NDArray[np.int64]:
    """Spreads hashes evenly over rows 1..rows-1; row 0 is kept for missing values.

    Args:
        hashes: well mixed 64-bit numbers.
        rows: rows of the table; a table of one row holds everything in row 0.

    Returns:
        int64 rows, same shape.
    """
    span = rows - 1
    if span < 1:
        return np.zeros(hashes.shape, dtype=np.int64)
    if span < 1 << 32:
        # floor(high 32 bits * span / 2^32): as even as a remainder, without the slow division.
        found = np.right_shift(hashes, np.uint64(32))
        found *= np.uint64(span)
        found >>= np.uint64(32)
    else:
        found = hashes % np.uint64(span)
    found += np.uint64(1)
    return found.view(np.int64)


def unaligned_words(data: NDArray[np.uint8]) -> U64:
    """[len - 7] the little-endian 64-bit word that begins at each byte (a view)."""
    count = max(len(data) - _WORD + 1, 0)
    return np.ndarray((count,), dtype="<u8", buffer=data, strides=(1,))


def hash_bytes(data: NDArray[np.uint8], starts: NDArray[np.int64],
               lengths: NDArray[np.int64]) -> U64:
    """Hashes byte strings that lie in one buffer.

    Works word by word over all strings at once, so that it loops over the longest string's
    words and never over strings.

    Args:
        data: [N] bytes.
        starts: [n] where each string begins.
        lengths: [n] bytes of each string.

    Returns:
        [n] uint64.
    """
    padded = np.zeros(len(data) + _WORD, dtype=np.uint8)
    padded[:len(data)] = data
    words = unaligned_words(padded)
    # The length starts the chain: "a" and "a\0" fill the same words.
    hashes = splitmix64(lengths.astype(np.uint64))
    active, at, left = np.arange(len(starts)), starts, lengths
    while True:
        longer = left > 0
        if not longer.all():
            active, at, left = active[longer], at[longer], left[longer]
        if not len(active):
            return hashes
        word = words[at] & _KEEP[np.minimum(left, _WORD)]
        hashes[active] = splitmix64(hashes[active] ^ word)
        at, left = at + _WORD, left - _WORD
