"""Many short decimal or hexadecimal numbers parsed at once, eight characters to a 64-bit word.

Each word holds eight characters, the first one in its lowest byte. A step combines neighbouring
digits of all words, so that three steps parse eight digits without a loop over numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardlab.data.hashing import U64, unaligned_words

HEX_DIGITS = 8
MAX_DECIMAL_DIGITS = 16
#: Bytes that must lie before the first and behind the last number of a buffer.
PADDING = MAX_DECIMAL_DIGITS

_BYTES = 0x0101010101010101  # one in each byte
_ZEROS = np.uint64(0x30 * _BYTES)  # "00000000"
_HIGH_BITS = np.uint64(0x80 * _BYTES)
#: KEEP_LAST[n] keeps the n high bytes, the last n characters.
_KEEP_LAST = np.array([0] + [(1 << 64) - (1 << (64 - 8 * n)) for n in range(1, 9)],
                      dtype=np.uint64)
_EIGHT_DIGITS = np.uint64(10**8)


def parse_hex(words: U64) -> tuple[U64, NDArray[np.bool_]]:
    """Reads eight hexadecimal digits from each word.

    Args:
        words: eight characters each, any shape.

    Returns:
        The 32-bit values as uint64, and where all eight characters were digits.
    """
    nibbles = words & np.uint64(0x0F * _BYTES)
    letters = (words >> np.uint64(6)) & np.uint64(_BYTES)
    nibbles += letters * np.uint64(9)
    # Digits written back must give the characters read, but for the case bit of letters.
    big = ((nibbles + np.uint64(6 * _BYTES)) >> np.uint64(4)) & np.uint64(_BYTES)
    differ = words ^ (nibbles + _ZEROS + big * np.uint64(0x27))
    # Letters behind F come out above 15.
    wrong = (differ & ~(big << np.uint64(5))) | (nibbles & np.uint64(0xF0 * _BYTES))
    valid = wrong == 0
    values = nibbles | nibbles << np.uint64(12)  # pairs of digits
    values = (values >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    values |= values << np.uint64(24)  # pairs of pairs
    values = (values >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    values = (values << np.uint64(16) | values >> np.uint64(32)) & np.uint64(0xFFFFFFFF)
    return values, valid


def parse_decimal(data: NDArray[np.uint8], starts: NDArray[np.int64],
                  ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Reads integers, with or without a minus sign; an empty field reads as 0.

    Args:
        data: bytes, with `PADDING` bytes before the first field and behind the last.
        starts: where each field begins, any shape.
        ends: where each field ends, same shape.

    Returns:
        int64 values, and where the field was an integer of at most 16 digits or empty.
    """
    words = unaligned_words(data)
    negative = data[starts] == ord("-")
    negative &= ends > starts
    digits = ends - starts - negative
    valid = (digits <= MAX_DECIMAL_DIGITS) & (digits >= negative)
    low = np.clip(digits, 0, HEX_DIGITS)
    values, good = _eight_decimals(words[ends - HEX_DIGITS] & _KEEP_LAST[low],
                                   _ZEROS & _KEEP_LAST[low])
    valid &= good
    if digits.max(initial=0) > HEX_DIGITS:
        high = np.clip(digits - HEX_DIGITS, 0, HEX_DIGITS)
        upper, good = _eight_decimals(words[ends - MAX_DECIMAL_DIGITS] & _KEEP_LAST[high],
                                      _ZEROS & _KEEP_LAST[high])
        values += upper * _EIGHT_DIGITS
        valid &= good
    signed = values.view(np.int64)
    np.negative(signed, out=signed, where=negative)
    return signed, valid


def _eight_decimals(words: U64, zeros: U64) -> tuple[U64, NDArray[np.bool_]]:
    digits = words ^ zeros
    over_nine = (digits + np.uint64(0x76 * _BYTES)) | digits
    valid = (over_nine & _HIGH_BITS) == 0
    pairs = digits * np.uint64(10) + (digits >> np.uint64(8))
    pairs &= np.uint64(0x00FF00FF00FF00FF)
    fours = pairs * np.uint64(100) + (pairs >> np.uint64(16))
    fours &= np.uint64(0x0000FFFF0000FFFF)
    eights = fours * np.uint64(10_000) + (fours >> np.uint64(32))
    eights &= np.uint64(0xFFFFFFFF)
    return eights, valid
