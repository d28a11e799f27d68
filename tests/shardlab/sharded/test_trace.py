"""The timeline: phases of both threads, as many steps as asked for, in Chrome's format."""

from __future__ import annotations

import json

import pytest

from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.trace import Trace, chrome_trace


def test_phases_of_the_wanted_steps_are_kept():
    clock = PhaseClock()
    clock.trace = trace = Trace(2)
    for _ in range(3):
        clock.lap("ids")
        clock.other_thread().lap("rows")
        clock.end_step()
    boxes = trace.boxes()
    assert [(box[0], box[1], box[4]) for box in boxes] == [
        (thread, phase, step) for step in range(2)
        for thread, phase in [(0, "ids"), (1, "rows"), (0, "overhead")]]
    assert all(seconds >= 0 for _, _, _, seconds, _ in boxes)
    assert trace.full


def test_chrome_reads_ranks_as_processes():
    found = json.loads(json.dumps(chrome_trace([[[0, "ids", 7.5, 0.25, 0]],
                                                [[1, "rows", 8.0, 0.5, 3]]])))
    boxes = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert boxes == [
        {"name": "ids", "ph": "X", "pid": 0, "tid": 0, "args": {"step": 0}, "ts": 0.0,
         "dur": 250000.0},
        {"name": "rows", "ph": "X", "pid": 1, "tid": 1, "args": {"step": 3}, "ts": 500000.0,
         "dur": 500000.0}]
    names = {(event["pid"], event["args"]["name"]) for event in found["traceEvents"]
             if event["ph"] == "M"}
    assert (1, "rank 1") in names
    assert (0, "looking ahead") in names
    assert chrome_trace([[], []])["traceEvents"]


@pytest.mark.parametrize(("ahead", "waited", "exposed", "share"), [
    (0.0, 0.0, 5.0, None), (4.0, 0.0, 0.0, 1.0), (4.0, 1.0, 2.0, 0.5), (2.0, 3.0, 1.0, 0.0)])
def test_hidden_share_counts_what_nobody_waited_for(ahead, waited, exposed, share):
    clock = PhaseClock()
    clock.ahead_s["rows"], clock.waited_s, clock.exposed_s = ahead, waited, exposed
    assert clock.hidden_share() == share
