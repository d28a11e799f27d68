"""Which checkpoints stay, and compaction: the same content in one folder, at any instant."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.train.manifest import MANIFEST, BaseEntry, Manifest
from shardlab.train.retention import latest, prune


def place(folder: Path, name: str, base: str | None = None) -> None:
    """A checkpoint without tables."""
    entry = None if base is None else BaseEntry(base, "0")
    (folder / name).mkdir()
    (folder / name / MANIFEST).write_bytes(Manifest(1, (), (), (), base=entry).to_bytes())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latest_and_prune_know_steps_by_number(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    for name in ("step-9", "step-10", "step-100", "step-x", ".tmp-step-200", ".trash-step-1"):
        place(tmp_path, name)
    (tmp_path / "step-300").mkdir()  # no manifest: not a checkpoint
    assert latest(tmp_path) == tmp_path / "step-100"
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step-10", "step-100", "step-300", "step-x"]


def test_base_of_a_kept_checkpoint_stays(tmp_path: Path) -> None:
    for step, base in ((1, None), (2, None), (3, "step-2"), (4, "step-2"), (5, "step-2")):
        place(tmp_path, f"step-{step}", base)
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step-2", "step-4", "step-5"]


@pytest.mark.parametrize("damaged", ["step-2", "step-3"])
def test_nothing_goes_where_a_manifest_is_damaged(tmp_path: Path, damaged: str) -> None:
    for step in (1, 2, 3):
        place(tmp_path, f"step-{step}")
    (tmp_path / damaged / MANIFEST).write_text("{")
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
