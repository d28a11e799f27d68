"""Real sharded training, killed and resumed: the same bits as training that was not killed."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardlab.comm import Groups
from shardlab.specs import EmbeddingBagConfig
from shardlab.train import TrainOptions, latest, load, verify
from tests.harness import rank_context, run_ranks, start_processes
from tests.shardlab.train.tiny_job import (
    BEHIND,
    MIXED,
    OPTIONS,
    TABLES,
    build_trainer,
    state_of,
    train_tiny_job,
)

KILL_TIMEOUT_S = 60.0

#: A trained state: tensors by name.
State = dict[str, Tensor]


class Killed(BaseException):
    """Stands for SIGKILL on every rank: nothing of the run goes on."""


def assert_identical(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def train_whole_and_killed(groups: Groups, folder: str, optimizer: str, kill_after: int,
                           options: TrainOptions,
                           tables: Sequence[EmbeddingBagConfig]) -> tuple[State, State]:
    """Final states of a run, and of one that was killed after some steps and resumed."""
    build = partial(build_trainer, groups, optimizer=optimizer, options=options, tables=tables)
    whole = build(f"{folder}/whole")
    whole.run()
    killed = build(f"{folder}/killed")
    runner, train = killed._step, killed._step.train

    def train_or_die(*arguments: object) -> object:
        if killed._at.step == kill_after:
            raise Killed
        return train(*arguments)

    object.__setattr__(runner, "train", train_or_die)
    with pytest.raises(Killed):
        killed.run()
    resumed = build(f"{folder}/killed")
    assert resumed.run().resumed_at == kill_after // 5 * 5
    return state_of(whole), state_of(resumed)


@pytest.mark.parametrize(("optimizer", "options", "tables"), [
    ("row_wise_adagrad", OPTIONS, TABLES), ("adam", OPTIONS, TABLES),
    ("row_wise_adagrad", BEHIND, TABLES), ("row_wise_adagrad", BEHIND, MIXED)],
    ids=["row_wise_adagrad", "adam", "behind", "mixed_behind"])
@pytest.mark.parametrize(("world_size", "kill_after"), [(1, 8), (2, 13), (2, 4)],
                         ids=["1_rank", "2_ranks_second_epoch", "2_ranks_no_checkpoint_yet"])
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, world_size: int, kill_after: int,
                                             optimizer: str, options: TrainOptions,
                                             tables: Sequence[EmbeddingBagConfig]) -> None:
    for whole, resumed in run_ranks(world_size, train_whole_and_killed, str(tmp_path), optimizer,
                                    kill_after, options, tables):
        assert_identical(whole, resumed)
    clocked = ("samples_per_s", "step_ms", "wait_share", "phase_ms", "seconds")
    lines = [[{key: value for key, value in json.loads(line).items() if key not in clocked}
              for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("whole", "killed")]
    assert lines[0] == lines[1]


def train_plain(groups: Groups, folder: str, rows: int) -> dict[str, Tensor]:
    """One epoch without parts that see one rank only; returns whole tables and dense weights."""
    trainer = build_trainer(groups, folder, plain=True, rows=rows, options=TrainOptions())
    summary = trainer.run()
    assert summary.validation is not None
    assert summary.validation.rows == 150
    collection = trainer.model.collections()["ebc"]
    state = dict(trainer.model.state_dict())
    for table in collection.tables:
        whole = torch.zeros(table.num_embeddings, table.embedding_dim)
        for chunk in collection.chunks():
            if chunk.table == table.name and (groups.rank == 0 or not chunk.replicated):
                count, columns = chunk.weights.shape
                whole[chunk.row_start:chunk.row_start + count,
                      chunk.col_start:chunk.col_start + columns] = chunk.weights
        state[table.name] = whole
    return state | {"auc": torch.tensor(summary.validation.auc)}


@pytest.mark.parametrize("rows", [3 * 32 + 1, 2 * 32 + 21, 5], ids=["empty_rank", "odd", "short"])
def test_uneven_last_batch_equals_one_rank(tmp_path: Path, rows: int) -> None:
    alone, = run_ranks(1, train_plain, str(tmp_path / "1"), rows)
    first, second = run_ranks(2, train_plain, str(tmp_path / "2"), rows)
    for name, expected in alone.items():
        found = first[name] + second[name] if name in ("user", "item", "hour") else first[name]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def load_elsewhere(groups: Groups, folder: str) -> tuple[int, dict[str, Tensor]]:
    trainer = build_trainer(groups, f"{folder}/other{groups.world_size}")
    source = latest(f"{folder}/checkpoints")
    assert source is not None
    extra = load(source, trainer.model, trainer.optimizer, groups)
    rows = {}
    for chunk in trainer.model.collections()["ebc"].chunks():
        for i in range(chunk.weights.shape[0]):
            for j in range(chunk.weights.shape[1]):
                rows[f"{chunk.table} {chunk.row_start + i} {chunk.col_start + j}"] = \
                    chunk.weights[i, j]
    return extra["position"]["step"], rows | dict(trainer.model.state_dict())


def train_one(groups: Groups, folder: str) -> None:
    build_trainer(groups, folder).run()


def test_checkpoint_of_two_ranks_loads_on_one_and_on_four(tmp_path: Path) -> None:
    run_ranks(2, train_one, str(tmp_path))
    two = run_ranks(2, load_elsewhere, str(tmp_path))
    for world_size in (1, 4):
        other = run_ranks(world_size, load_elsewhere, str(tmp_path))
        assert {step for step, _ in other} == {20}
        merged, expected = ({name: tensor for _, cells in ranks[::-1]
                             for name, tensor in cells.items() if "norm" not in name}
                            for ranks in (other, two))
        assert_identical(merged, expected)


Start = Callable[[Path, float, str], BaseProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the tiny job as a process; whatever still runs at the end is killed."""
    started = []

    def begin(folder: Path, step_seconds: float, kind: str) -> BaseProcess:
        started.append(rank_context().Process(target=train_tiny_job, daemon=True,
                                              args=(str(folder), step_seconds, kind)))
        start_processes(started[-1:])
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.join()


def ended(process: BaseProcess) -> int | None:
    """The exit code of a process that ends."""
    process.join(KILL_TIMEOUT_S)
    return process.exitcode


def wait_for(path: Path, lines: int, process: BaseProcess) -> None:
    """Waits until the run has written that many records."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.exitcode is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"{path} did not get {lines} records"
        time.sleep(0.01)


def wait_for_checkpoint(folder: Path, process: BaseProcess) -> None:
    """Waits until the run has one; it is written behind training."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while latest(folder) is None:
        assert process.exitcode is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"{folder} did not get a checkpoint"
        time.sleep(0.01)


def wait_for_newer(folder: Path, seen: Path, process: BaseProcess) -> bool:
    """Waits until the run has begun another checkpoint; False where it ended before."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while latest(folder) == seen and not any(folder.glob(".tmp-step-*")):
        if process.exitcode is not None:
            return False
        assert time.monotonic() < deadline, f"{folder} did not get another checkpoint"
        time.sleep(0.002)
    return True


@pytest.mark.parametrize(("kind", "kills"), [("rows", 4), ("mixed", 2)])
def test_process_killed_by_sigkill_continues_bit_for_bit(tmp_path: Path, start: Start,
                                                         kind: str, kills: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, 0.0, kind)
    victim = start(killed, 0.1, kind)
    wait_for(killed / "metrics.jsonl", 6, victim)
    wait_for_checkpoint(killed / "checkpoints", victim)
    victim.kill()
    assert ended(victim) == -signal.SIGKILL
    assert not (killed / "digest").exists()
    for _ in range(kills - 1):  # and again, in a restart, a step, a checkpoint, its removal
        seen = latest(killed / "checkpoints")
        assert seen is not None
        verify(seen)
        victim = start(killed, 0.1, kind)
        chance = random.Random(seen.name)
        if not wait_for_newer(killed / "checkpoints", seen, victim):
            break
        time.sleep(chance.uniform(0, 0.3))
        victim.kill()
        ended(victim)
    assert ended(start(killed, 0.0, kind)) == 0
    assert ended(undisturbed) == 0
    assert (killed / "digest").read_text() == (whole / "digest").read_text()
    assert json.loads((killed / "summary.json").read_text())["resumed_at"] > 0
    assert OPTIONS.checkpoint_every == 5
