"""Runs a job on this rank, from the job to the summary; every rank of the job does the same.

    groups -> run folder -> plan -> model -> shards -> readers -> trainer -> summary
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from shardlab import comm
from shardlab.launch.building import (
    build_job_model,
    build_row_optimizer,
    build_train_options,
    dense_optimizer,
)
from shardlab.launch.planning import choose_plan
from shardlab.launch.readers import JobReader, build_readers
from shardlab.sharded import shard
from shardlab.train import RunFolder, Summary, Trainer, build_schedule, open_run_folder

if TYPE_CHECKING:
    from shardlab.config import JobConfig
    from shardlab.plan import ShardingPlan


def run_job(job: JobConfig) -> int:
    """Trains a job on the ranks that torchrun's variables describe, or alone where there are none.

    Args:
        job: the job.

    Returns:
        The exit code for this process: 0, or 128 + the signal that stopped the run.

    Raises:
        ShardLabError: whatever the job, the data or the machine do not allow.
    """
    _set_determinism(job.train.deterministic)
    groups = comm.init()
    run = open_run_folder(job.train.run_dir, job.train.resume, groups)
    plan = choose_plan(job, groups, run.path / "plan.json" if run.resume_from else None)
    if groups.rank == 0:
        run.write_job(job.resolved_yaml())
        run.write_plan(plan.to_json())
    summary, readers = train(job, plan, run, groups)
    _report(summary, readers, groups)
    comm.shutdown()
    return summary.exit_code


def train(job: JobConfig, plan: ShardingPlan, run: RunFolder,
          groups: comm.Groups) -> tuple[Summary, list[JobReader]]:
    """Builds what the job describes, and trains it as planned.

    Args:
        job: the job.
        plan: where its tables go.
        run: the run's folder, and the checkpoint to continue from.
        groups: the ranks.

    Returns:
        What the training came to, and the readers that were used.
    """
    train_reader, validation_reader = build_readers(job, groups)
    model, optimizer = shard(
        build_job_model(job), plan, optimizer=build_row_optimizer(job.optimizer.sparse),
        dense_optimizer=dense_optimizer(job.optimizer.dense), groups=groups, seed=job.train.seed)
    schedule = job.optimizer.schedule
    scheduler = build_schedule(optimizer, schedule.kind, schedule.warmup_steps, schedule.steps,
                               schedule.final_factor)
    trainer = Trainer(model, optimizer, groups, train_reader, validation_reader, run,
                      build_train_options(job), scheduler)
    summary = trainer.run()
    return summary, [train_reader, *([validation_reader] if validation_reader else [])]


def _set_determinism(wanted: bool) -> None:
    torch.use_deterministic_algorithms(wanted)
    # Nobody reads memory before writing it; filling every new tensor with NaN would cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted:  # cuBLAS is deterministic only with a workspace of a fixed size
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _report(summary: Summary, readers: list[JobReader], groups: comm.Groups) -> None:
    """Shows the summary on rank 0, and how many bad rows all ranks left out."""
    mine = sum(reader.bad_rows.count for reader in readers)
    skipped = sum(comm.gather_objects_json(mine, groups))
    if groups.rank == 0:
        console = Console()
        console.print(summary.table())
        if skipped:
            console.print(f"bad rows skipped: {skipped:,}")
