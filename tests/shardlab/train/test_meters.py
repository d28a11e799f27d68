"""Step times by a clock of our own, bytes by counters of our own."""

from __future__ import annotations

import os

import pytest
import torch

from shardlab.specs import ShardingType
from shardlab.storage_bytes import TierBytes
from shardlab.train import meters
from shardlab.train.meters import (
    Pace,
    SentBytes,
    StepTimer,
    WireMeter,
    model_tier_bytes,
    peak_rss_bytes,
)
from tests.shardlab.train.fakes import FakeCollection, FakeModel, plan_of, table


class Clock:
    """A perf_counter that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters.time, "perf_counter", clock)
    return clock


def take_step(timer: StepTimer, clock: Clock, waiting: float, work: float, rows: int) -> None:
    clock.now += waiting
    timer.got_batch()
    clock.now += work
    timer.end_step(rows)


def test_timer_counts_steps_and_leaves_out_the_rest(clock: Clock) -> None:
    timer = StepTimer()
    take_step(timer, clock, 0.25, 0.75, rows=100)
    take_step(timer, clock, 0.0, 3.0, rows=60)
    clock.now += 50.0  # a validation
    timer.restart()
    first = timer.take_interval()
    assert first == Pace(steps=2, rows=160, seconds=4.0, samples_per_s_mean=40.0,
                         samples_per_s_median=60.0, step_ms_p50=2000.0,
                         step_ms_p90=pytest.approx(2800.0), wait_share=0.0625)
    take_step(timer, clock, 0.0, 1.0, rows=100)
    assert timer.take_interval().samples_per_s_mean == 100.0
    assert timer.take_interval().steps == 0
    assert timer.total().seconds == 5.0
    assert timer.total().samples_per_s_median == 100.0


def test_timer_without_steps_is_zero(clock: Clock) -> None:
    assert StepTimer().total() == Pace(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def fake_model() -> FakeModel:
    tables = [table("t", 10, 4), table("u", 3, 2)]
    plan = plan_of(tables, [ShardingType.ROW_WISE] * 2, 2)
    return FakeModel(FakeCollection(tables, plan, rank=0))


def test_wire_meter_counts_training_only() -> None:
    model = fake_model()
    wire = model.collections()["ebc"].wire
    wire.rows_bytes = 7  # before the meter was made
    meter = WireMeter(model, world_size=2)
    wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes = 10, 27, 30
    dense = 4 * 4  # 3 weights and a bias, fp32; at two ranks the ring sends them once
    assert meter.take(steps=3) == SentBytes(10, 20, 30, 3 * dense)
    wire.rows_bytes += 1000  # a validation
    meter.restart()
    wire.ids_bytes += 1
    assert meter.take(steps=1) == SentBytes(1, 0, 0, dense)


def test_one_rank_sends_nothing() -> None:
    assert WireMeter(fake_model(), world_size=1).take(steps=5).total == 0


def test_sent_bytes_add_up_and_divide() -> None:
    total = SentBytes(1, 2, 3, 4) + SentBytes(10, 20, 30, 40)
    assert total == SentBytes(11, 22, 33, 44)
    assert (total / 11).total == 10


def test_tier_bytes_of_all_collections() -> None:
    assert model_tier_bytes(fake_model()) == TierBytes(hbm=4 * (5 * 4 + 1 * 2))


def test_peak_rss_follows_an_allocation() -> None:
    before = peak_rss_bytes()
    size = before + (64 << 20)  # above any earlier peak, once it lies beside what is resident now
    torch.ones(size // 4)
    assert peak_rss_bytes() >= size
    assert before > 10 << 20
    assert os.path.exists("/proc/self/status") or peak_rss_bytes() > 0
