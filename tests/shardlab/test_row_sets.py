"""Sets of rows as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlab.errors import PlanError
from shardlab.row_sets import rows_from_text, rows_to_text


@pytest.mark.parametrize(("rows", "text"), [
    ((), ""), ((0,), "0"), ((0, 1), "0-1"), ((3, 5, 6, 7, 9), "3 5-7 9")])
def test_text_names_ranges(rows, text):
    assert rows_to_text(rows) == text
    assert rows_from_text(text) == rows


@given(st.sets(st.integers(0, 60) | st.integers(0, 2**40)))
def test_every_set_comes_back(rows):
    ascending = tuple(sorted(rows))
    assert rows_from_text(rows_to_text(ascending)) == ascending


@pytest.mark.parametrize("text", ["a", "1-", "-3", "1-x", "1,2"])
def test_other_text_is_refused(text):
    with pytest.raises(PlanError, match=f"rows must be written like '0-63 70', found '{text}'"):
        rows_from_text(text)
