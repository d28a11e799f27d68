"""Shapes of tensor-train tables: the paper's counts, chosen factors, and what is refused."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from shardlab.errors import ConfigError
from shardlab.tensor_train_shapes import tensor_train_shape

#: rows, row factors, parameters at ranks 16, 32, 64: the 21 counts of arXiv 2101.11714, table 2,
#: with columns 2 x 2 x 4; and at rank 8, whose counts follow from the formula.
PAPER = [
    (10131227, (200, 220, 250), (135040, 495360, 1891840), 39360),
    (8351593, (200, 200, 209), (122176, 449152, 1717504), 35488),
    (7046547, (200, 200, 200), (121600, 448000, 1715200), 35200),
    (5461306, (166, 175, 188), (106944, 393088, 1502976), 31072),
    (2202608, (125, 130, 136), (79264, 291648, 1115776), 22992),
    (286181, (53, 72, 75), (43360, 160448, 615808), 12464),
    (142572, (50, 52, 55), (31744, 116736, 446464), 9216),
]


@pytest.mark.parametrize(("rows", "factors", "counts", "narrow"), PAPER,
                         ids=[str(p[0]) for p in PAPER])
def test_parameter_counts_of_the_paper(rows, factors, counts, narrow):
    for rank, count in zip((16, 32, 64, 8), (*counts, narrow), strict=True):
        shape = tensor_train_shape(rows, 16, rank, 3, factors, (2, 2, 4))
        assert shape.parameters == count
        assert shape.row_factors == factors


@hypothesis.given(rows=st.one_of(st.integers(1, 3000), st.integers(1, 2**40)),
                  columns=st.integers(1, 300), cores=st.integers(2, 4), rank=st.integers(1, 64))
@hypothesis.settings(max_examples=150, deadline=None)
def test_chosen_factors_fit(rows, columns, cores, rank):
    shape = tensor_train_shape(rows, columns, rank, cores)
    assert rows <= shape.padded_rows <= rows * 1.02
    assert math.prod(shape.column_factors) == columns
    assert len(shape.row_factors) == len(shape.column_factors) == cores
    assert shape.ranks[0] == shape.ranks[-1] == 1
    assert all(1 <= r <= rank for r in shape.ranks[1:-1])
    assert shape.row_factors == tuple(sorted(shape.row_factors))


@pytest.mark.parametrize(("rows", "cores"), [(10131227, 3), (7046547, 3), (2**40, 4), (10**7, 2)])
def test_large_tables_get_balanced_factors(rows, cores):
    factors = tensor_train_shape(rows, 16, 8, cores).row_factors
    assert factors[-1] <= 1.05 * rows ** (1 / cores)


def test_columns_balance_as_in_the_paper():
    assert tensor_train_shape(1000, 16, 8).column_factors == (2, 2, 4)
    assert tensor_train_shape(1000, 64, 8).column_factors == (4, 4, 4)
    assert tensor_train_shape(1000, 13, 8).column_factors == (1, 1, 13)


def test_ranks_are_no_wider_than_their_sides():
    shape = tensor_train_shape(27, 8, 64, 3, (3, 3, 3), (2, 2, 2))
    assert shape.ranks == (1, 6, 6, 1)
    assert tensor_train_shape(1000, 8, (4, 7)).ranks == (1, 4, 7, 1)


@pytest.mark.parametrize(("arguments", "text"), [
    ((100, 8, 4, 5), "2 to 4 cores, found 5 cores"),
    ((0, 8, 4), "tensor_train of 0 rows x 8 columns: expected at least one row"),
    ((100, 8, 4, 3, (4, 4, 4)), r"row_factors \[4, 4, 4\] express 64 rows, fewer than 100"),
    ((100, 8, 4, 3, (4, 4)), r"row_factors: expected 3 positive integers, one per core"),
    ((100, 8, 4, 3, None, (2, 2, 3)), r"column_factors \[2, 2, 3\] multiply to 12, not to 8"),
    ((100, 8, (4, 4, 4)), r"3 cores have 2 bonds, each of rank 1 or more; found rank \(4, 4, 4\)"),
    ((100, 8, 0), "each of rank 1 or more; found rank 0"),
], ids=range(7))
def test_what_does_not_fit_is_named(arguments, text):
    with pytest.raises(ConfigError, match=text):
        tensor_train_shape(*arguments)
