"""The disk through the framework's own tier, small; what is refused."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from shardlab.errors import LaunchError
from shardlab.launch.probe import disk


def test_a_small_file_is_measured_and_deleted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(disk, "_RUN_PAGES", 64)
    monkeypatch.setattr(disk, "_PAGES_READ", 32)
    found = disk.disk_speed(str(tmp_path), 1 << 20, 0.0)
    assert [depth for depth, _ in found.read_iops] == [1, 8, 64]
    assert min(found.write_iops, found.read_bytes_per_s, found.write_bytes_per_s,
               *(iops for _, iops in found.read_iops)) > 0
    assert list(tmp_path.iterdir()) == []


def test_no_directory_and_no_space(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(LaunchError, match=r"--ssd .*none: no such directory; name one on the disk"):
        disk.disk_speed(str(tmp_path / "none"), 1 << 20, 0.0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 5, 5))
    with pytest.raises(LaunchError, match="GB free, measuring takes a file of"):
        disk.disk_speed(str(tmp_path), 1 << 20, 0.0)
