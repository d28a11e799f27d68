"""``shardlab train``: runs a job on ranks that it starts here, or joins ranks that exist."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from shardlab.cli.job import job_arguments, read_job
from shardlab.errors import REQUEUE, SIGNAL_EXIT, LaunchError

if TYPE_CHECKING:
    from shardlab.config import JobConfig
    from shardlab.launch.environment import RankInfo


@click.command()
@job_arguments
@click.option("--plan", metavar="FILE", help="Execute this plan (JSON of `shardlab plan --json`).")
@click.option("--resume", metavar="auto|never|PATH",
              help="auto: continue from the run folder's newest checkpoint, if any; never: start "
                   "anew; PATH: continue from this checkpoint. Default: the job's, else auto.")
def train(job: str | None, demo: bool, ranks: int | None, overrides: tuple[str, ...],
          plan: str | None, resume: str | None) -> int:
    """Train a job.

    Started by torchrun or srun, this process joins as one rank. Else it starts the job's ranks
    on this machine and waits for them.
    """
    config = read_job(job, demo, overrides, ranks=ranks, plan=plan, train__resume=resume)
    from shardlab.launch.environment import find_rank

    place = find_rank(os.environ)
    if place is not None:
        _join(config, place, ranks)
    if config.ranks > 1:
        return _start(config)
    from shardlab.launch.train import run_job

    return run_job(config)


def _join(config: JobConfig, place: RankInfo, asked: int | None) -> NoReturn:
    """Works as one rank of a job that another program started, and ends with its exit code."""
    if asked not in (None, place.world_size):
        raise LaunchError(f"--ranks {asked} asked, but {place.starter} started "
                          f"{place.world_size} ranks; leave --ranks out")
    os.environ.update(place.variables())
    from shardlab.launch.rank import guarded

    def work() -> int:
        from shardlab.launch.train import run_job

        return run_job(config)

    guarded(work)


def _start(config: JobConfig) -> int:
    """Starts the ranks, which read the job as it was resolved here; returns the exit code."""
    from shardlab.launch.local import rank_command, start_local_ranks

    with tempfile.TemporaryDirectory(prefix="shardlab-job-") as folder:
        resolved = Path(folder) / "job.yaml"
        resolved.write_text(config.resolved_yaml(), encoding="utf-8")
        code = start_local_ranks(config.ranks, rank_command("train", str(resolved)))
    if code:
        number = signal.SIGUSR1 if code == REQUEUE else signal.Signals(code - SIGNAL_EXIT)
        click.echo(f"stopped by {number.name}", err=True)
    return code
