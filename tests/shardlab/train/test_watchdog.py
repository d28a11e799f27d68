"""A run without progress ends in time, and the rank that others wait for is named."""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

from shardlab.comm import Groups
from shardlab.errors import STALLED, StallError
from shardlab.sharded.clock import PhaseClock
from shardlab.train import watchdog
from shardlab.train.watchdog import Watchdog


class Disk:
    """Stands for storage that works on one table."""

    table = ""

    def __init__(self, table: str) -> None:
        self.table = table

    def read(self, seconds: float) -> None:
        time.sleep(seconds)


def stalled(clock: PhaseClock, groups: Groups, seconds: float = 1.5) -> list[StallError]:
    seen: list[StallError] = []
    with Watchdog(clock, groups, 0.4, seen.append) as dog:
        dog.beat("training step 7")
        Disk("t_user").read(seconds)
    return seen


def clock_in(phase_number: int) -> PhaseClock:
    """A clock that has seen a step of three phases, and stands in one of them."""
    clock = PhaseClock()
    phases = ("ids", "read", "rows")
    for phase in phases:
        clock.lap(phase)
    clock.end_step()
    for phase in phases[:phase_number]:
        clock.lap(phase)
    return clock


def test_phase_table_and_line_are_named() -> None:
    (error,) = stalled(clock_in(1), Groups())
    assert error.exit_code == STALLED
    assert "rank 0 is at training step 7, phase read, table 't_user' (test_watchdog.py:" in \
        str(error)


def test_progress_keeps_the_watchdog_quiet() -> None:
    seen: list[StallError] = []
    with Watchdog(PhaseClock(), Groups(), 0.8, seen.append) as dog:
        for step in range(12):
            dog.beat(f"training step {step}")
            time.sleep(0.1)
    assert not seen


def test_without_a_timeout_nobody_watches() -> None:
    before = threading.active_count()
    with Watchdog(PhaseClock(), Groups(), None, lambda _: None):
        assert threading.active_count() == before


def test_the_rank_that_is_behind_is_named(monkeypatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "_open_store", lambda groups: store)
    messages: dict[int, list[StallError]] = {0: [], 1: []}

    def rank(number: int) -> None:
        clock = clock_in(2 if number == 0 else 1)
        messages[number] = stalled(clock, Groups(rank=number, world_size=2))

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "it waits for rank 1, which is at training step 7, phase read, table 't_user'" in \
        str(messages[0][0])
    assert str(messages[1][0]).endswith("the others wait for it")


def test_a_silent_rank_is_named(monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "_open_store", lambda groups: dist.HashStore())
    (error,) = stalled(clock_in(2), Groups(rank=0, world_size=2))
    assert "nothing is heard of rank 1: it has ended, or is stopped" in str(error)
