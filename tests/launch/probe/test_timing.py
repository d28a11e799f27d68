"""Medians, and how much of a core a thread got."""

from __future__ import annotations

import time

import pytest
import torch

from shardlab.comm import Groups
from shardlab.launch.probe.timing import CoreTime, median_seconds, median_together

CPU = torch.device("cpu")


def test_medians_take_five_runs_at_least_and_one_to_warm_up() -> None:
    runs: list[int] = []
    assert median_seconds(lambda: runs.append(1), 0.0, CPU) > 0
    assert len(runs) == 1 + 5


def test_medians_leave_out_slow_runs() -> None:
    count = iter(range(100))
    assert median_seconds(lambda: time.sleep(0.02 if next(count) == 3 else 0.0), 0.0, CPU) < 0.01


def test_ranks_run_equally_often() -> None:
    runs: list[int] = []
    assert median_together(lambda: runs.append(1), 0.0, Groups(device=CPU)) > 0
    assert len(runs) == 5 + 5


def test_sleeping_is_no_computing() -> None:
    core = CoreTime()
    assert core.share == 1.0
    with core.watching(False):
        time.sleep(0.01)
    assert core.share == 1.0
    with core.watching(True):
        time.sleep(0.05)
    assert core.share == pytest.approx(0.0, abs=0.2)
