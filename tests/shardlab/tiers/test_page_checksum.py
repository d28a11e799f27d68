"""The checksum finds every change of a page, of its place and of its file, on both faces alike."""

from __future__ import annotations

import numpy as np
import pytest

from shardlab.ops.registry import native
from shardlab.tiers.page_checksum import page_checksums

PAGE_WORDS = 512


@pytest.fixture
def page() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (1, 4096), dtype=np.uint8)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_every_single_bit_counts(page: np.ndarray):
    right = page_checksums(page, numbers(9), 5)[0]
    for bit in range(8):
        flipped = np.repeat(page, 4088, axis=0)
        flipped[np.arange(4088), np.arange(4088)] ^= np.uint8(1 << bit)
        assert (page_checksums(flipped, np.full(4088, 9, np.uint64), 5) != right).all()


def test_same_bit_of_two_words_does_not_cancel(page: np.ndarray):
    right = page_checksums(page, numbers(9), 5)[0]
    for byte in (0, 7):  # of every word: the lowest and the highest bits
        both = np.repeat(page, PAGE_WORDS - 2, axis=0)
        both[:, byte] ^= 0x80
        words = np.arange(1, PAGE_WORDS - 1)
        both[np.arange(len(words)), 8 * words + byte] ^= 0x80
        assert (page_checksums(both, np.full(len(both), 9, np.uint64), 5) != right).all()


def test_swapped_sectors_and_words_count(page: np.ndarray):
    right = page_checksums(page, numbers(9), 5)[0]
    for size in (8, 64, 512):
        moved = page.copy()
        moved[0, :size], moved[0, size:2 * size] = page[0, size:2 * size], page[0, :size]
        assert page_checksums(moved, numbers(9), 5)[0] != right


def test_place_and_salt_count_and_trailer_does_not(page: np.ndarray):
    right = page_checksums(page, numbers(9), 5)[0]
    assert page_checksums(page, numbers(10), 5)[0] != right
    assert page_checksums(page, numbers(9), 6)[0] != right
    page[0, 4088:] ^= 255
    assert page_checksums(page, numbers(9), 5)[0] == right


def test_blank_pages_differ_and_are_never_zero():
    blank = np.zeros((1000, 4096), np.uint8)
    found = page_checksums(blank, np.arange(1000, dtype=np.uint64), 0)
    assert len(set(found.tolist())) == 1000
    assert (found != 0).all()


@pytest.mark.skipif(native() is None, reason="the native library is not built")
def test_faces_agree():
    pages = np.random.default_rng(4).integers(0, 256, (20, 4096), dtype=np.uint8)
    for salt in (0, 1, 2**63, 2**64 - 1):
        places = np.random.default_rng(salt % 97).integers(0, 2**62, 20)
        expected = page_checksums(pages, places.astype(np.uint64), salt).tolist()
        assert [native().page_checksum(page.ctypes.data, int(place), salt)
                for page, place in zip(pages, places, strict=True)] == expected
