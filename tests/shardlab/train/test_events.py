"""TensorBoard events: every number of a record, and a clear word when it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardlab.errors import ConfigError
from shardlab.train.events import EventWriter

RECORD = {"kind": "train", "step": 50, "epoch": 0, "loss": 0.5, "auc": 0.75, "note": "text",
          "phase_ms": {"ids": 1.5}}


def test_numbers_become_scalars(tmp_path: Path) -> None:
    with EventWriter(tmp_path, resumed_at=0, enabled=True) as events:
        events.write(RECORD)
        events.write({**RECORD, "kind": "validation", "step": 60})
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == [
        "train/loss", "train/auc", "train/phase_ms/ids", "validation/loss", "validation/auc",
        "validation/phase_ms/ids"]
    assert [(event.step, event.value) for event in found.Scalars("train/auc")] == [(50, 0.75)]


def test_resumed_run_hides_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    for resumed_at, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        with EventWriter(tmp_path, resumed_at, enabled=True) as events:
            for step in steps:
                events.write({"kind": "train", "step": step, "loss": float(step + resumed_at)})
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in found] == \
        [(10, 10.0), (20, 20.0), (30, 50.0), (40, 60.0)]


def test_disabled_writer_imports_and_writes_nothing(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with EventWriter(tmp_path / "events", resumed_at=0, enabled=False) as events:
        events.write(RECORD)
    assert not (tmp_path / "events").exists()


def test_missing_tensorboard_names_the_extra(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'shardlab\[tensorboard\]', or set "
                                          r"train\.tensorboard=false"):
        EventWriter(tmp_path, resumed_at=0, enabled=True)
