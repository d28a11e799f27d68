"""The checksum of pages in plain numpy: the judge of the native one, and the headers' own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

# As in csrc/disk_page.cpp, which says why.
_LANES = 8
_TURN = np.uint64(31)
_LANE_STEP = 0x9E3779B97F4A7C15
_MULTIPLIER = np.uint64(0x9FB21C651E98DF25)
_FINISH = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


def page_checksums(pages: Pages, numbers: Words, salt: int) -> Words:
    """Checksums of pages over payload, page number and salt.

    Args:
        pages: uint8 [n, 4096]; the trailers do not count.
        numbers: uint64 [n].
        salt: of the file.

    Returns:
        uint64 [n], never 0.
    """
    words = np.ascontiguousarray(pages).view(np.uint64).copy()
    words[:, -1] = numbers  # in the place of the trailer
    starts = [(salt + (lane + 1) * _LANE_STEP) % 2**64 for lane in range(_LANES)]
    lanes = np.tile(np.array(starts, np.uint64), (len(pages), 1))
    for first in range(0, words.shape[1], _LANES):
        lanes = _turn(lanes, words[:, first:first + _LANES])
    total = numbers.copy()
    for lane in range(_LANES):
        total = _turn(total, lanes[:, lane])
    total ^= total >> _HALF
    total *= _FINISH
    total ^= total >> _HALF
    total[total == 0] = 1
    return total


def _turn(state: Words, words: Words) -> Words:
    mixed = state ^ words
    return ((mixed << _TURN) | (mixed >> (np.uint64(64) - _TURN))) * _MULTIPLIER
