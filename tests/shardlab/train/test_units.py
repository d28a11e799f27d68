"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from shardlab.train.units import format_bytes, format_count, format_metric, format_seconds


@pytest.mark.parametrize(("size", "text"), [
    (0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234, "1.23 kB"), (999_600, "1 MB"),
    (1.5e9, "1.5 GB"),
])
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (98_765, "98.8 k"), (1e6, "1 M")])
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


@pytest.mark.parametrize(("value", "text"), [(0.76543, "0.7654"), (math.nan, "-"), (None, "-")])
def test_format_metric(value: float | None, text: str) -> None:
    assert format_metric(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"),
                                               (3723, "1:02:03")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
