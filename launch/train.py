"""Runs a job on this rank, from the job to the summary; every rank of the job does the same.

    groups -> run folder -> plan -> model -> shards -> readers -> trainer -> summary
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console

from shardlab import comm
from shardlab.launch.building import (
    build_job_model,
    build_row_optimizer,
    build_train_options,
    dense_optimizer,
)
from shardlab.launch.eager import leave_compiler_out
from shardlab.launch.forecast import check_memory
from shardlab.launch.hierarchy import choose_hierarchy
from shardlab.launch.hot_rows import choose_hot_rows
from shardlab.launch.planning import ChosenPlan, choose_plan
from shardlab.launch.preflight import check_versions
from shardlab.launch.rank import end_rank
from shardlab.launch.readers import JobReader, build_readers
from shardlab.launch.wire_autopilot import choose_wire
from shardlab.ops.allocator import keep_freed_memory
from shardlab.sharded import ShardedModel, shard
from shardlab.train import RunFolder, Summary, Trainer, build_schedule, open_run_folder

if TYPE_CHECKING:
    from shardlab.config import JobConfig


def run_job(job: JobConfig) -> int:
    """Trains a job on the ranks that torchrun's variables describe, or alone where there are none.

    Args:
        job: the job.

    Returns:
        The exit code for this process: 0, or 128 + the signal that stopped the run.

    Raises:
        ShardLabError: whatever the job, the data or the machine do not allow.
    """
    leave_compiler_out()
    keep_freed_memory()
    # One heap: pyarrow's own allocator would keep 30 MB a rank of what readers freed.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    _set_determinism(job.train.seed, job.train.deterministic)
    groups = comm.init(job.exchange.timeout_s, job.exchange.transport)
    check_versions(groups)
    run = open_run_folder(job.train.run_dir, job.train.resume, groups)
    chosen = choose_plan(job, groups, _former_plan(run))
    if groups.rank == 0:
        run.write_job(job.resolved_yaml())
        run.write_plan(chosen.text)
    if job.train.check_memory:
        check_memory(job, chosen.plan, groups)
    hierarchy, groups = choose_hierarchy(job, chosen.plan, groups)
    if groups.rank == 0 and groups.world_size > 1:
        run.write_exchange(hierarchy.to_json())
    summary = train(job, chosen, run, groups)
    if groups.rank == 0:
        Console().print(summary.table())
    if summary.exit_code:  # a launcher stops ranks that outlive one with such a code
        comm.barrier(groups)
    comm.shutdown()
    return summary.exit_code


def train(job: JobConfig, chosen: ChosenPlan, run: RunFolder, groups: comm.Groups) -> Summary:
    """Builds what the job describes, and trains it as planned.

    Args:
        job: the job.
        chosen: where its tables go.
        run: the run's folder, and the checkpoint to continue from.
        groups: the ranks.
    """
    train_reader, validation_reader = build_readers(job, groups)
    if chosen.hot_rows_are_open:
        chosen = _choose_hot_rows(job, chosen, train_reader, run)
    model, optimizer = shard(
        build_job_model(job), chosen.plan, optimizer=build_row_optimizer(job.optimizer.sparse),
        dense_optimizer=dense_optimizer(job.optimizer.dense), groups=groups, seed=job.train.seed,
        ssd_dir=job.train.ssd_dir)
    if chosen.wire_is_open:
        _choose_wire(job, chosen, model, train_reader, run)
    schedule = job.optimizer.schedule
    scheduler = build_schedule(optimizer, schedule.kind, schedule.warmup_steps, schedule.steps,
                               schedule.final_factor)
    return Trainer(model, optimizer, groups, train_reader, validation_reader, run,
                   build_train_options(job), scheduler, on_stall=end_rank).run()


def _choose_hot_rows(job: JobConfig, chosen: ChosenPlan, reader: JobReader,
                     run: RunFolder) -> ChosenPlan:
    """Finds the hot rows that the job wants; rank 0 says and writes down which."""
    choice = choose_hot_rows(job, chosen.plan, reader, reader.groups)
    chosen = chosen.with_plan(choice.plan)
    if reader.groups.rank == 0:
        Console().print("\n".join(choice.lines), highlight=False)
        run.write_plan(chosen.text)
    return chosen


def _choose_wire(job: JobConfig, chosen: ChosenPlan, model: ShardedModel, reader: JobReader,
                 run: RunFolder) -> None:
    """Fills in the codecs that the job leaves open; rank 0 says and writes down which."""
    choice = choose_wire(job, chosen.plan, model, reader, model.groups)
    if model.groups.rank == 0:
        Console().print("\n".join(choice.lines), highlight=False)
        run.write_wire(choice.to_json(job.wire.bound))
        run.write_plan(chosen.with_plan(choice.plan).text)


def _former_plan(run: RunFolder) -> Path | None:
    """The plan of the run that the checkpoint to continue from belongs to, where it is known."""
    if run.resume_from is None:
        return None
    path = run.resume_from.parent.parent / "plan.json"
    return path if path.is_file() else None


def _set_determinism(seed: int, wanted: bool) -> None:
    random.seed(seed)  # generators that a user's model may draw from; checkpoints hold their state
    np.random.seed(seed)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(wanted)
    else:  # the same without torch's compiler, which it would load to tell it
        torch.set_deterministic_debug_mode("error" if wanted else "default")
    # Nobody reads memory before writing it; filling every new tensor with NaN would cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted:  # cuBLAS is deterministic only with a workspace of a fixed size
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
