"""The clock books every moment on one phase; a sharded step names all of its phases."""

from __future__ import annotations

import pytest
import torch

from shardlab.phases import MEASURED_PHASES, PHASES
from shardlab.sharded import clock as module
from shardlab.sharded.clock import PhaseClock


class Seconds:
    """A perf_counter that a test moves."""

    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    seconds = Seconds()
    monkeypatch.setattr(module.time, "perf_counter", seconds)
    return seconds


def step(clock: PhaseClock, seconds: Seconds, **laps: float) -> None:
    for phase, ms in laps.items():
        seconds.now += ms / 1e3
        clock.lap(phase)
    clock.end_step()


def shown(found: dict[str, float]) -> dict[str, float]:
    return {phase: pytest.approx(ms) for phase, ms in found.items() if ms}


def test_nothing_is_lost_between_laps(seconds: Seconds) -> None:
    clock = PhaseClock()
    step(clock, seconds, wait=1.0, ids=2.0, read=4.0)
    seconds.now += 8e-3
    clock.lap("ids")
    seconds.now += 16e-3
    clock.end_step()
    assert shown(clock.take_interval()) == {"wait": 0.5, "ids": 5.0, "read": 2.0, "overhead": 8.0}


def test_an_interval_ends_where_it_is_taken_and_medians_go_on(seconds: Seconds) -> None:
    clock = PhaseClock()
    for ms in (1.0, 2.0, 30.0):
        step(clock, seconds, ids=ms)
    assert clock.take_interval()["ids"] == pytest.approx(11.0)
    assert clock.take_interval() == {}
    step(clock, seconds, ids=4.0)
    assert clock.take_interval()["ids"] == pytest.approx(4.0)
    assert list(clock.median_ms()) == list(MEASURED_PHASES)
    assert clock.median_ms()["ids"] == pytest.approx(3.0)


def test_restart_forgets_what_was_no_step(seconds: Seconds) -> None:
    clock = PhaseClock()
    step(clock, seconds, ids=1.0)
    seconds.now += 5.0  # a validation
    clock.lap("read")
    clock.restart()
    step(clock, seconds, ids=1.0)
    assert shown(clock.take_interval()) == {"ids": 1.0}


def test_a_clock_that_saw_no_step_has_nothing() -> None:
    clock = PhaseClock()
    assert clock.take_interval() == {}
    assert clock.median_ms() == {}


def test_a_gpu_is_timed_only_when_asked() -> None:
    clock = PhaseClock(torch.device("cuda"))
    assert not clock.running
    clock.lap("ids")
    clock.end_step()
    assert clock.median_ms() == {}
    on_cpu = PhaseClock(torch.device("cpu"))
    on_cpu.time_device()
    assert on_cpu.running


@pytest.mark.gpu
def test_events_time_a_gpu() -> None:
    clock = PhaseClock(torch.device("cuda"))
    clock.time_device()
    matrix = torch.ones(4096, 4096, device="cuda")
    for _ in range(3):
        clock.lap("wait")
        for _ in range(20):
            matrix @ matrix
        clock.lap("dense")
        clock.end_step()
    found = clock.take_interval()
    assert found["dense"] > 10 * (found["ids"] + found["overhead"])
    assert len(clock.median_ms()) == len(MEASURED_PHASES)


def test_planner_and_runtime_speak_of_the_same_phases() -> None:
    from shardlab.planner import estimate

    assert estimate.PHASES == PHASES
