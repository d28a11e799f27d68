"""What is not finite is found before the update, named, or left out on all ranks alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardlab.comm import Groups
from shardlab.data.batch import Batch
from shardlab.data.reader import Reader
from shardlab.errors import NOT_FINITE, NotFiniteError
from shardlab.train import Trainer
from tests.harness import run_ranks
from tests.shardlab.train.tiny_job import (
    GLOBAL_BATCH,
    OPTIONS,
    ROWS,
    MemoryRows,
    build_trainer,
    state_of,
)


class PoisonedReader(Reader):
    """Puts a value into dense column 1 of sample 2 of the batches that end at given rows."""

    bad: dict[int, float]

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.position in self.bad:
                batch.dense[2, 1] = self.bad[batch.position]
            yield batch


def poisoned(folder: str, groups: Groups, on_nan: str, bad: dict[int, float],
             rank: int = 0) -> Trainer:
    trainer = build_trainer(groups, folder, plain=True,
                            options=replace(OPTIONS, on_nan=on_nan, epochs=1, log_every=3))
    reader = PoisonedReader(MemoryRows(ROWS, 1), GLOBAL_BATCH // groups.world_size,
                            rank=groups.rank, world_size=groups.world_size)
    reader.bad = bad if groups.rank == rank else {}
    trainer.train_reader = reader
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stop_names_feature_and_batch_and_updates_nothing(tmp_path: Path, value: float) -> None:
    trainer = poisoned(str(tmp_path), Groups(), "stop", {7 * GLOBAL_BATCH: value})
    with pytest.raises(NotFiniteError, match=r"step 7, rank 0, batch that ends at row 224: dense "
                       r"feature 1 of sample 2 is not finite; nothing was updated") as caught:
        trainer.run()
    assert caught.value.exit_code == NOT_FINITE
    assert [path.name for path in trainer.run_folder.checkpoints.iterdir()] == ["step-5"]
    assert all(bool(tensor.isfinite().all()) for tensor in state_of(trainer).values())


def test_rows_that_are_not_finite_are_named_by_feature_and_table(tmp_path: Path) -> None:
    trainer = poisoned(str(tmp_path), Groups(), "stop", {})
    for chunk in trainer.model.collections()["ebc"].chunks():
        if chunk.table == "item":
            chunk.weights[:, 2] = math.nan
            trainer.model.collections()["ebc"].load_chunk(chunk)
    with pytest.raises(NotFiniteError, match=r"step 1, .* the rows read for feature 'item' "
                       r"\(table 'item'\), sample 0, are not finite"):
        trainer.run()


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    trainer = poisoned(str(tmp_path), Groups(), "stop", {})
    collection = trainer.model.collections()["ebc"]

    def poison(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[3, 8] = math.inf  # the first column behind those of `user`
        return grad

    # After the guard's own hook would be too late: the model's input is where gradients go wrong.
    real = torch.cat
    trainer.model.module.top.register_forward_pre_hook(
        lambda _, inputs: inputs[0].register_hook(
            lambda grad: real([grad[:, :3], poison(grad[:, 3:])], 1)) and None)
    with pytest.raises(NotFiniteError, match=r"the gradient of feature 'item' \(table 'item'\), "
                       r"sample 3, is not finite"):
        trainer.run()
    assert collection.pending  # and was not applied


def test_a_bad_batch_is_skipped_as_if_it_had_not_been(tmp_path: Path) -> None:
    end = 4 * GLOBAL_BATCH
    trainer = poisoned(str(tmp_path / "skip"), Groups(), "skip_batch", {end: math.nan})
    summary = trainer.run()
    assert summary.steps == 10
    assert summary.skipped_rows == GLOBAL_BATCH
    assert trainer.optimizer.steps_taken == 9
    assert all(bool(tensor.isfinite().all()) for tensor in state_of(trainer).values())


def test_too_many_bad_batches_end_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shardlab.train.finite.MOST_SKIPPED", 2)
    bad = {step * GLOBAL_BATCH: math.nan for step in range(3, 9)}
    trainer = poisoned(str(tmp_path), Groups(), "skip_batch", bad)
    with pytest.raises(NotFiniteError, match="2 batches in a row were left out; step 5, rank 0"):
        trainer.run()


def skip_on_one_rank(groups: Groups, folder: str) -> object:
    trainer = poisoned(folder, groups, "skip_batch", {4 * GLOBAL_BATCH: math.nan}, rank=1)
    summary = trainer.run()
    finite = all(bool(tensor.isfinite().all()) for tensor in state_of(trainer).values())
    return summary.steps, summary.skipped_rows, trainer.optimizer.steps_taken, finite


def test_ranks_skip_together(tmp_path: Path) -> None:
    first, second = run_ranks(2, skip_on_one_rank, str(tmp_path))
    assert first == second == (10, GLOBAL_BATCH, 9, True)
