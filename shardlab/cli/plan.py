"""``shardlab plan``: where every table of a job would go, without running it, without torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardlab.cli.job import job_arguments, read_job
from shardlab.errors import ConfigError

if TYPE_CHECKING:
    from shardlab.config import JobConfig
    from shardlab.planner import Topology

_PIPE_WIDTH = 160


@click.command()
@job_arguments
@click.option("--topology", metavar="NAME|FILE",
              help="Machine to plan for, such as 8xh100, 16x8xa100-80gb or a YAML file; default: "
                   "the job's, else --ranks ranks of this machine.")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(dir_okay=False, writable=True),
              help="Also write the plan with its predictions; `shardlab train --plan` reads it.")
@click.option("--all", "everything", is_flag=True, help="Show every rank and table.")
def plan(job: str | None, demo: bool, ranks: int | None, overrides: tuple[str, ...],
         topology: str | None, json_file: str | None, everything: bool) -> int:
    """Show where every table of a job would go, and what each rank would hold and do."""
    config = read_job(job, demo, overrides, ranks=ranks, topology=topology)
    from shardlab.planner import plan as make_plan
    from shardlab.planner.report import plan_to_json, print_report

    result = make_plan(config.table_configs(), _machine(config, ranks), config.batch_size,
                       config.optimizer.sparse.kind)
    # Wide where it goes to a file or a pipe: the tables would else be folded at 80 columns.
    print_report(result, width=None if sys.stdout.isatty() else _PIPE_WIDTH, everything=everything)
    if json_file is not None:
        Path(json_file).write_text(plan_to_json(result), encoding="utf-8")
        click.echo(f"plan written to {json_file}")
    return 0


def _machine(config: JobConfig, ranks: int | None) -> Topology:
    from shardlab.planner import local_cpu, read_topology

    if config.topology is None:
        return local_cpu(config.ranks)
    topology = read_topology(config.topology)
    if ranks not in (None, topology.world_size):
        raise ConfigError(f"--ranks {ranks}: topology {config.topology} has "
                          f"{topology.world_size} ranks; leave one of them out "
                          "(--set topology= removes the job's)")
    return topology
