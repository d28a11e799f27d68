"""Paths and patterns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardlab.data.files import expand_paths
from shardlab.errors import DataError


def test_patterns_keep_their_order_and_sort_their_matches(tmp_path: Path) -> None:
    for name in ("b1", "b2", "a1", "[x]"):
        (tmp_path / name).touch()
    found = expand_paths([f"{tmp_path}/b*", tmp_path / "a1", f"{tmp_path}/[x]"])
    assert [Path(file).name for file in found] == ["b1", "b2", "a1", "[x]"]
    assert expand_paths(tmp_path / "a1") == [str(tmp_path / "a1")]


@pytest.mark.parametrize(("path", "text"), [
    ("none/day_*", r"'none/day_\*': no such file, and no file matches it as a pattern"),
    ([], "data path: none given"),
    (".", r"\.: is a folder; name its files, such as \./\*"),
], ids=["no match", "nothing", "folder"])
def test_refuses(path: str | list[str], text: str) -> None:
    with pytest.raises(DataError, match=text):
        expand_paths(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every file")
def test_refuses_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0)
    with pytest.raises(DataError, match="secret: no permission to read it"):
        expand_paths(tmp_path / "secret")
