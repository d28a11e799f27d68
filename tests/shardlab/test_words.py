"""Words of messages."""

from __future__ import annotations

import pytest

from shardlab.words import counted


@pytest.mark.parametrize(("number", "text"), [
    (0, "0 ranks"), (1, "1 rank"), (2, "2 ranks"), (1024, "1,024 ranks")])
def test_nouns_are_counted(number: int, text: str) -> None:
    assert counted(number, "rank") == text
