"""Synthetic Criteo: real cardinalities and skew, labels of a planted teacher, no file.

A row depends on the seed and its index alone, so that any world size, start and batch size cut
the same endless stream. The seed picks the rows; the teacher is the same for every seed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from shardlab.data.criteo_fit import DENSE_STEPS, RANK_STEPS, dense_quantiles, rank_quantiles
from shardlab.data.hashing import GAMMA, MISSING_ID, U64, rows_of, splitmix64
from shardlab.data.rows import Bags, RowBlock
from shardlab.data.teacher import Teacher
from shardlab.errors import DataError, nearest_name
from shardlab.presets import CRITEO_DENSE_NAMES, CRITEO_SPARSE_NAMES

_NUM_SPARSE, _NUM_DENSE = len(CRITEO_SPARSE_NAMES), len(CRITEO_DENSE_NAMES)
# One row's random words: two ids to a word, four dense steps to a word, one for the label.
_ID_WORDS = _NUM_SPARSE // 2
_DENSE_WORDS = -(-_NUM_DENSE // 4)
_NUM_WORDS = _ID_WORDS + _DENSE_WORDS + 1
_HALF = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_STEP_BITS = np.uint64(32 - (RANK_STEPS.bit_length() - 1))
_DENSE_FIELDS = np.array([[0], [16], [32], [48]], np.uint64)
_LABEL_BITS = 53  # of a float64's mantissa
#: Rows made at once: the temporaries stay in a core's cache.
_CHUNK_ROWS = 1024


class SyntheticCriteoSource:
    """An endless stream of rows that look like Criteo's.

    Args:
        features: feature name -> rows of its table; values are hashed to it as real ones are.
        columns: feature name -> column C1..C26; absent: the column of its own name.
        seed: picks the rows.

    Raises:
        DataError: a feature whose column is not one of C1..C26.
    """

    num_dense = _NUM_DENSE

    def __init__(self, features: Mapping[str, int], columns: Mapping[str, str] | None = None,
                 seed: int = 0) -> None:
        self.features = tuple(features)
        self._rows = list(features.values())
        self._columns = [_column_of(name, (columns or {}).get(name, name)) for name in features]
        word_numbers = np.arange(_NUM_WORDS, dtype=np.int64)[:, None]
        seeds = np.full((1, 1), seed & ((1 << 64) - 1), np.uint64)
        self._keys = splitmix64(splitmix64(seeds) + word_numbers.view(np.uint64))
        self._ranks = rank_quantiles().ravel()
        self._rank_places = np.arange(_NUM_SPARSE)[:, None] * (RANK_STEPS + 1)
        self._dense = dense_quantiles().ravel()
        self._dense_places = np.arange(_NUM_DENSE)[:, None] * DENSE_STEPS
        self._teacher = Teacher()

    def num_rows(self) -> None:
        """Endless."""

    def open(self) -> SyntheticCriteoSource:
        """The source is its own cursor: it holds no place."""
        return self

    def close(self) -> None:
        """Nothing to close."""

    def read(self, first: int, last: int) -> RowBlock:
        """Rows [first, last)."""
        rows = last - first
        labels, dense = np.empty(rows, np.float32), np.empty((rows, _NUM_DENSE), np.float32)
        ids = np.empty((len(self.features), rows), np.int64)
        for low in range(0, rows, _CHUNK_ROWS):
            part = slice(low, min(low + _CHUNK_ROWS, rows))
            words = self._words(first + part.start, first + part.stop)
            ranks, steps = self._values(words)
            hashes = _hash_values(ranks)
            dense[part] = self._dense[steps + self._dense_places].T
            for out, column, size in zip(ids, self._columns, self._rows, strict=True):
                out[part] = rows_of(hashes[column], size)
                out[part][ranks[column] == 0] = MISSING_ID
            chance = 1 / (1 + np.exp(-self._teacher.logits(hashes, steps).astype(np.float64)))
            labels[part] = (words[-1] >> np.uint64(64 - _LABEL_BITS)) < chance * 2 ** _LABEL_BITS
        return RowBlock(labels, dense, [Bags(row) for row in ids])

    def teacher_logits(self, first: int, last: int) -> NDArray[np.float32]:
        """[n] the logits that the labels of rows [first, last) were drawn from."""
        ranks, steps = self._values(self._words(first, last))
        return self._teacher.logits(_hash_values(ranks), steps)

    def _words(self, first: int, last: int) -> U64:
        """[words, n] random words of rows [first, last)."""
        rows = np.arange(first, last, dtype=np.int64).view(np.uint64)
        return splitmix64(self._keys + rows * np.uint64(GAMMA))

    def _values(self, words: U64) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[26, n] frequency ranks (0: missing) and [13, n] dense steps that the words pick."""
        uniform = np.concatenate((words[:_ID_WORDS] >> _HALF, words[:_ID_WORDS] & _LOW_HALF))
        place = (uniform >> _STEP_BITS).view(np.int64) + self._rank_places
        within = (uniform & ((np.uint64(1) << _STEP_BITS) - np.uint64(1))).astype(np.float64)
        within *= 2.0 ** -int(_STEP_BITS)
        low = self._ranks[place]
        ranks = (low + within * (self._ranks[place + 1] - low)).astype(np.int64)
        fields = words[_ID_WORDS:-1, None] >> _DENSE_FIELDS
        steps = (fields & np.uint64(DENSE_STEPS - 1)).view(np.int64)
        return ranks, steps.reshape(-1, words.shape[1])[:_NUM_DENSE]


def _hash_values(ranks: NDArray[np.int64]) -> U64:
    """[26, n] hash of each value; a value is its feature's number and its frequency rank."""
    return splitmix64(ranks + (np.arange(1, _NUM_SPARSE + 1)[:, None] << 40))


def _column_of(feature: str, column: str) -> int:
    if column not in CRITEO_SPARSE_NAMES:
        raise DataError(f"feature {feature!r} asks for column {column!r}; synthetic Criteo has "
                        f"C1 to C26{nearest_name(column, list(CRITEO_SPARSE_NAMES))}")
    return CRITEO_SPARSE_NAMES.index(column)
