"""The arguments that train and plan share: a job file, and overrides of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shardlab.errors import ConfigError
from shardlab.words import counted

if TYPE_CHECKING:
    from shardlab.config import JobConfig

_Command = TypeVar("_Command", bound=Callable[..., Any])


def job_arguments(command: _Command) -> _Command:
    """Adds JOB.yaml, --demo, --ranks and --set to a command."""
    for decorate in (
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                     help="Override a value of the job, such as optimizer.sparse.lr=0.1 or "
                          "tables[0].sharding=row_wise. Can be repeated."),
        click.option("--ranks", type=click.IntRange(min=1), metavar="N",
                     help="Ranks on this machine; default: the job's."),
        click.option("--demo", is_flag=True,
                     help="Use the built-in job: a DLRM on generated Criteo-like data."),
        click.argument("job", required=False, metavar="[JOB.yaml]",
                       type=click.Path(exists=True, dir_okay=False)),
    ):
        command = decorate(command)
    return command


def read_job(job: str | None, demo: bool, overrides: tuple[str, ...], *, files: bool = True,
             **options: object) -> JobConfig:
    """Loads what `job_arguments` named.

    Args:
        job: path of the job file.
        demo: take the built-in job instead.
        overrides: what followed --set.
        files: whether the job's data and checkpoints must be on this machine.
        options: further values of the job by key (dots as double underscores); None: not given.

    Raises:
        ConfigError: not exactly one of job and demo, or the job's own problems.
    """
    if demo == (job is not None):
        raise ConfigError("give a job file, JOB.yaml, or --demo" if job is None
                          else f"both {job} and --demo are given; keep one of them")
    from shardlab.config import load_job

    given = [f"{key.replace('__', '.')}={json.dumps(value)}"  # JSON is YAML, with all quotes
             for key, value in options.items() if value is not None]
    try:
        return load_job(job, [*overrides, *given], files)
    except ConfigError as error:
        name = job or "the demo job"
        title = f"{name} has {counted(len(error.problems), 'problem')}:"
        raise ConfigError([title, *(f"  {line}" for line in error.problems)]) from None
