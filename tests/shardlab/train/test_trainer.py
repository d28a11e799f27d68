"""The training loop around small stand-ins: what is done when, and what is written."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from shardlab.comm import Groups, all_reduce_
from shardlab.errors import CheckpointError, ShardLabError
from shardlab.specs import ShardingType
from shardlab.train.options import TrainOptions
from shardlab.train.run_folder import open_run_folder
from shardlab.train.schedule import build_schedule
from shardlab.train.summary import Summary
from shardlab.train.trainer import Trainer
from tests.harness import run_ranks
from tests.shardlab.train.fakes import (
    FakeCollection,
    FakeModel,
    FakeReader,
    fake_clicks,
    plan_of,
    table,
)

ALONE = Groups()
OPTIONS = TrainOptions(log_every=4, checkpoint_every=5, validate_every=10)
BATCH = 16
ROWS = 16 * 12 + 5  # 13 steps, the last one smaller
STEPS = 13


def build(folder: Path, options: TrainOptions = OPTIONS, *, groups: Groups = ALONE,
          resume: str = "auto", schedule: bool = True, rows: int = ROWS) -> Trainer:
    """A trainer of a linear model with dropout on made-up clicks."""
    torch.manual_seed(1)
    tables = [table("t", 8, 2)]
    plan = plan_of(tables, [ShardingType.ROW_WISE], groups.world_size)
    model = FakeModel(FakeCollection(tables, plan, groups.rank))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    batch = BATCH // groups.world_size
    readers = [FakeReader(*fake_clicks(count, seed), batch, groups.rank, groups.world_size)
               for count, seed in ((rows, 0), (100, 1))]
    return Trainer(model, optimizer, groups, *readers, open_run_folder(folder, resume, groups),
                   options, build_schedule(optimizer, "cosine", 3, 30) if schedule else None,
                   Console(file=io.StringIO()))


def records(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict[str, object]]:
    """Records without what a clock measured."""
    clocked = ("samples_per_s", "step_ms", "wait_share", "phase_ms", "seconds")
    return [{key: value for key, value in record.items() if key not in clocked}
            for record in records(folder)]


def weights(trainer: Trainer) -> list[Tensor]:
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    return [*trainer.model.state_dict().values(), *state]


def assert_same_end(one: Trainer, other: Trainer) -> None:
    for left, right in zip(weights(one), weights(other), strict=True):
        assert torch.equal(left, right)
    assert timeless(one.run_folder.path) == timeless(other.run_folder.path)


def test_run_logs_validates_and_saves_where_due(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    summary = trainer.run()
    assert [(record["kind"], record["step"]) for record in records(tmp_path)] == [
        ("train", 4), ("train", 5), ("train", 8), ("train", 10), ("validation", 10),
        ("train", 12), ("train", 13), ("validation", 13)]
    assert sorted(path.name for path in trainer.run_folder.checkpoints.iterdir()) == \
        ["step-10", "step-13"]
    assert (summary.steps, summary.epochs, summary.resumed_at) == (STEPS, 1, 0)
    assert (summary.pace.steps, summary.pace.rows) == (STEPS, ROWS)
    assert summary.validation is not None
    assert summary.validation.rows == 100
    assert summary.validation.auc > 0.7
    assert summary.checkpoint == str(tmp_path / "checkpoints" / "step-13")
    assert summary.exit_code == 0
    assert summary.wire_per_step.ids == pytest.approx(8 * ROWS / STEPS)  # validation sent none
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == STEPS
    printed = trainer.console.file.getvalue()
    assert "step 4/13  epoch 1" in printed
    assert "validation on 100 rows  AUC 0." in printed


def test_loss_is_the_mean_over_the_interval(tmp_path: Path) -> None:
    options = TrainOptions(log_every=STEPS)
    trainer = build(tmp_path, options)
    losses = []
    trainer.model.linear.register_forward_hook(
        lambda _, __, out: losses.append(out.detach().squeeze(1)))
    trainer.run()
    labels = trainer.train_reader.labels
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.cat(losses[:STEPS]), labels)
    assert records(tmp_path)[0]["loss"] == pytest.approx(float(expected), rel=1e-6)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run goes on."""


@pytest.mark.parametrize("at", [1, 5, 9, 12, 13], ids=lambda at: f"killed_after_{at}")
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, at: int) -> None:
    options = replace(OPTIONS, epochs=2)
    whole = build(tmp_path / "whole", options)
    whole.run()
    killed = build(tmp_path / "killed", options)
    step = killed._step

    class Killing:
        predict = step.predict

        def train(self, *arguments: object) -> object:
            if killed._at.step == at:
                raise Killed
            return step.train(*arguments)

    killed._step = Killing()
    with pytest.raises(Killed):
        killed.run()
    resumed = build(tmp_path / "killed", options)
    assert resumed.run().resumed_at == at // 5 * 5
    assert_same_end(whole, resumed)


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
@pytest.mark.parametrize("at", [1, 9, 12], ids=["mid_interval", "at_validation", "at_the_end"])
def test_stop_signal_saves_and_the_rest_follows(tmp_path: Path, number: int, code: int,
                                                at: int) -> None:
    whole = build(tmp_path / "whole")
    whole.run()
    stopped = build(tmp_path / "stopped")
    stopped.model.linear.register_forward_hook(
        lambda *_: os.kill(os.getpid(), number) if stopped._at.step == at else None)
    summary = stopped.run()
    assert summary.exit_code == code
    assert summary.steps == {1: 4, 9: 10, 12: 13}[at]
    assert summary.checkpoint is not None
    assert summary.checkpoint.endswith(f"step-{summary.steps}")
    resumed = build(tmp_path / "stopped")
    assert resumed.run().exit_code == 0
    assert_same_end(whole, resumed)


def test_a_long_interval_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shardlab.train.interval.STOP_WITHIN_S", 0.0)
    stopped = build(tmp_path / "stopped", TrainOptions(log_every=1000))
    stopped.model.linear.register_forward_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if stopped._at.step == 2 else None)
    assert stopped.run().steps == 3


def test_max_steps_ends_inside_an_epoch(tmp_path: Path) -> None:
    summary = build(tmp_path, TrainOptions(epochs=3, max_steps=17, log_every=100)).run()
    assert (summary.steps, summary.epochs) == (17, 1)
    assert [(record["kind"], record["step"]) for record in records(tmp_path)] == [
        ("train", 13), ("validation", 13), ("train", 17), ("validation", 17)]
    again = build(tmp_path, TrainOptions(epochs=3, max_steps=20, log_every=100))
    assert again.run().resumed_at == 17
    assert records(tmp_path)[-1]["step"] == 20


def test_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    build(tmp_path).run()
    before = timeless(tmp_path)
    summary = build(tmp_path).run()
    assert (summary.steps, summary.pace.steps) == (STEPS, 0)
    assert timeless(tmp_path) == before


def test_checkpoint_of_another_folder_starts_new_records(tmp_path: Path) -> None:
    build(tmp_path / "a", replace(OPTIONS, max_steps=5)).run()
    source = str(tmp_path / "a" / "checkpoints" / "step-5")
    assert build(tmp_path / "b", resume=source).run().resumed_at == 5
    assert records(tmp_path / "b")[0]["step"] == 8
    assert len(records(tmp_path / "a")) == 3


def test_run_without_validation_reader(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.validation_reader = None
    assert trainer.run().validation is None
    assert all(record["kind"] == "train" for record in records(tmp_path))


def test_loss_that_is_not_finite_stops_without_a_checkpoint(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.train_reader.dense[BATCH * 6] = torch.inf
    with pytest.raises(ShardLabError, match=r"step 7, rank 0, .* feature 0 of sample 0 is not"):
        trainer.run()
    assert [path.name for path in trainer.run_folder.checkpoints.iterdir()] == ["step-5"]


def test_schedule_must_be_there_on_both_sides(tmp_path: Path) -> None:
    build(tmp_path, replace(OPTIONS, max_steps=5)).run()
    with pytest.raises(CheckpointError, match=r"step-5 has a learning-rate schedule, the job has"):
        build(tmp_path, schedule=False).run()


def test_bf16_runs_the_dense_layers_under_autocast(tmp_path: Path) -> None:
    trainer = build(tmp_path, replace(OPTIONS, dense_dtype="bf16"))
    seen = []
    trainer.model.linear.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    summary = trainer.run()
    assert set(seen) == {torch.bfloat16}
    assert trainer.model.linear.weight.dtype == torch.float32
    assert summary.validation is not None
    assert summary.validation.auc > 0.7


def test_tensorboard_gets_the_records(tmp_path: Path) -> None:
    build(tmp_path, replace(OPTIONS, tensorboard=True)).run()
    assert list((tmp_path / "tensorboard").iterdir())


def train_part(groups: Groups, folder: str, stop_rank: int | None) -> tuple[Summary, list[Tensor]]:
    """Trains on this rank; the fake model has no DDP, so its gradients are averaged here."""
    def average(parameter: Tensor) -> None:
        all_reduce_(parameter.grad, groups)
        parameter.grad.div_(groups.world_size)

    trainer = build(Path(folder), replace(OPTIONS, log_every=2), groups=groups)
    trainer.model.dropout.p = 0.0
    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(average)
    if stop_rank == groups.rank:
        trainer.model.linear.register_forward_hook(
            lambda *_: trainer._signal.received.add(signal.SIGTERM))
    return trainer.run(), [*trainer.model.state_dict().values()]


def test_uneven_batches_of_two_ranks_equal_one_rank(tmp_path: Path) -> None:
    (alone, expected), = run_ranks(1, train_part, str(tmp_path / "1"), None)
    results = run_ranks(2, train_part, str(tmp_path / "2"), None)
    for summary, found in results:
        assert summary.steps == alone.steps == STEPS
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
        assert summary.validation is not None
        assert alone.validation is not None
        assert summary.validation.auc == pytest.approx(alone.validation.auc, abs=1e-3)
        assert len(summary.peak_rss_bytes) == len(summary.tables) == 2
    assert results[0][0].to_dict() | {"pace": 0} == results[1][0].to_dict() | {"pace": 0}


def test_one_ranks_signal_stops_all_at_the_same_step(tmp_path: Path) -> None:
    results = run_ranks(2, train_part, str(tmp_path), 1)
    assert [(summary.steps, summary.exit_code) for summary, _ in results] == [(2, 143)] * 2
