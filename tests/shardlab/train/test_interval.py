"""A log interval: summed over ranks, with stop signals, and refused when a loss is not finite."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from shardlab.comm import Groups
from shardlab.errors import ShardLabError
from shardlab.phases import MEASURED_PHASES
from shardlab.specs import ShardingType
from shardlab.train.interval import IntervalLog
from shardlab.train.stop_signal import StopSignal
from tests.harness import run_ranks
from tests.shardlab.train.fakes import FakeCollection, FakeModel, plan_of, table


def make(groups: Groups) -> tuple[IntervalLog, FakeModel, StopSignal]:
    tables = [table("t", 4, 2)]
    plan = plan_of(tables, [ShardingType.ROW_WISE], groups.world_size)
    model, stop = FakeModel(FakeCollection(tables, plan, groups.rank)), StopSignal()
    return IntervalLog(model, groups, stop), model, stop


def add(log: IntervalLog, rows: int, loss: float = 0.5, label: float = 1.0) -> None:
    log.add(torch.zeros(rows), torch.full((rows,), label), torch.tensor(loss), 2 * rows)


def test_flush_without_steps_is_none() -> None:
    assert make(Groups())[0].flush(0) is None


def test_flush_takes_what_was_added() -> None:
    log, model, stop = make(Groups())
    add(log, 3)
    add(log, 5, label=0.0)
    model.collections()["ebc"].wire.rows_bytes = 70
    interval = log.flush(2)
    assert interval is not None
    assert interval.metrics.rows == 8
    assert interval.metrics.logloss == pytest.approx(math.log(2))
    assert interval.metrics.auc == 0.5
    assert (interval.pace.steps, interval.pace.rows) == (2, 16)
    assert interval.wire.total == 70
    assert interval.stop is None
    assert list(interval.phase_ms) == list(MEASURED_PHASES)
    assert interval.phase_ms["overhead"] > 0
    stop.received.update([signal.SIGINT])
    add(log, 1)
    interval = log.flush(3)
    assert interval is not None
    assert (interval.metrics.rows, interval.wire.total) == (1, 0)
    assert interval.stop == signal.SIGINT


def test_loss_that_is_not_finite_names_its_step() -> None:
    log, _, _ = make(Groups())
    for loss in (0.5, 0.4, math.nan, math.inf):
        add(log, 1, loss)
    with pytest.raises(ShardLabError, match="the loss is not finite at step 103; lower"):
        log.flush(104)


def two_ranks(groups: Groups) -> tuple[object, ...]:
    log, model, stop = make(groups)
    wire = model.collections()["ebc"].wire
    wire.ids_bytes = 10 * (groups.rank + 1)
    add(log, 4 * groups.rank, label=float(groups.rank))  # rank 0 has no row in this step
    add(log, 4, label=float(groups.rank))
    if groups.rank == 1:
        stop.received.update([signal.SIGINT, signal.SIGTERM])
    interval = log.flush(2)
    assert interval is not None
    add(log, 1, loss=math.inf if groups.rank == 1 else 0.1)
    add(log, 1, loss=math.nan if groups.rank == 0 else 0.1)
    with pytest.raises(ShardLabError) as caught:
        log.flush(4)
    return interval.metrics, interval.wire, interval.stop, str(caught.value), interval.phase_ms


def test_ranks_see_the_same_sums_signals_and_failures() -> None:
    first, second = run_ranks(2, two_ranks)
    assert first == second
    metrics, wire, stop, text, phase_ms = first
    assert phase_ms["overhead"] > 0
    assert (metrics.rows, metrics.label_rate) == (12, pytest.approx(8 / 12))
    assert wire.ids == 30
    assert wire.dense_all_reduce == 2 * 2 * 16  # 2 ranks, 2 steps, 4 fp32 parameters
    assert stop == signal.SIGTERM
    assert "not finite at step 3;" in text
