"""The thread beside the one that trains: jobs in order, and who goes first on a link."""

from __future__ import annotations

import threading

import pytest

from shardlab.comm.worker import LaneWorker, RightOfWay


def test_jobs_run_in_order_and_carry_errors():
    worker, seen = LaneWorker(), []

    def fail() -> None:
        raise ValueError("no")

    futures = [worker.submit(lambda i=i: seen.append(i)) for i in range(3)]
    failed = worker.submit(fail)
    last = worker.submit(lambda: 7)
    assert last.result(5) == 7
    assert seen == [0, 1, 2]
    assert all(future.done() for future in futures)
    with pytest.raises(ValueError, match="no"):
        failed.result(5)


def test_a_job_passes_once_its_number_may():
    way = RightOfWay()
    first, second, third = (way.number() for _ in range(3))
    assert first < second < third
    passed = [threading.Event() for _ in range(2)]

    def go(number: int, event: threading.Event) -> None:
        way.wait(number)
        event.set()

    threads = [threading.Thread(target=go, args=pair, daemon=True)
               for pair in zip((second, third), passed, strict=True)]
    for thread in threads:
        thread.start()
    way.wait(0)
    way.give(first)
    assert not passed[0].wait(0.05)
    way.give(second)
    assert passed[0].wait(5)
    assert not passed[1].is_set()
    way.give()
    assert passed[1].wait(5)
    way.give(first)  # what may pass stays so
    way.wait(third)
