"""``shardlab launch``: a job on local ranks that restart, or on the nodes of a Slurm cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from shardlab.cli.job import read_job
from shardlab.errors import ConfigError

_JOB = click.argument("job", metavar="JOB.yaml", type=click.Path(exists=True, dir_okay=False))
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                    help="Override a value of the job. Can be repeated.")


@click.group()
def launch() -> None:
    """Start a job so that it survives: local ranks, or a Slurm job."""


@launch.command()
@_JOB
@_SET
@click.option("--ranks", type=click.IntRange(min=1), metavar="N",
              help="Ranks to start; default: `ranks` of the job.")
@click.option("--min-ranks", type=click.IntRange(min=1), metavar="M",
              help="Go on with one rank fewer after each loss, down to M; default: N, none "
                   "fewer.")
@click.option("--restarts", type=click.IntRange(min=0), default=3, show_default=True, metavar="R",
              help="Losses to survive (a rank killed, crashed or stuck); the next ends the job.")
def local(job: str, overrides: tuple[str, ...], ranks: int | None, min_ranks: int | None,
          restarts: int) -> int:
    """Train on ranks of this machine, and start them again when one is lost.

    What is lost are the steps since the last checkpoint, so the job must name train.run_dir.
    Exit codes: docs/launch.md.
    """
    config = read_job(job, False, overrides, ranks=ranks)
    from shardlab.launch.elastic import supervise

    fewest = config.ranks if min_ranks is None else min_ranks
    if fewest > config.ranks:
        raise ConfigError(f"--min-ranks {fewest} is more than --ranks {config.ranks}")
    return supervise(config, fewest, restarts, lambda text: click.echo(text, err=True))


@launch.command()
@_JOB
@_SET
@click.option("--nodes", required=True, metavar="N|MIN-MAX",
              help="Nodes; MIN-MAX takes what is free and plans for it, with --set "
                   "train.elastic=true.")
@click.option("--gpus-per-node", type=click.IntRange(min=0), default=0, metavar="M",
              help="GPUs of each node, one rank each; 0: ranks on CPUs.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), metavar="M",
              help="Ranks of each node; default: one per GPU, or 1.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), metavar="C",
              help="Cores of each rank; default: the cluster's.")
@click.option("--time", metavar="LIMIT",
              help="Time limit, such as 24:00:00; default: the partition's.")
@click.option("--partition", metavar="NAME", help="Partition; default: the cluster's.")
@click.option("--account", metavar="NAME", help="Account that is charged; default: yours.")
@click.option("--qos", metavar="NAME", help="Quality of service; default: the account's.")
@click.option("--name", metavar="NAME", help="Name of the job; default: the job file's.")
@click.option("--requeue", is_flag=True,
              help="Go back into the queue after preemption, the time limit's warning, or a "
                   "node's failure, and resume; default: end.")
@click.option("--signal", "warn_s", type=click.IntRange(min=1), default=120, show_default=True,
              metavar="SECONDS",
              help="Ranks save and end (SIGUSR1) this long before the time limit.")
@click.option("--interface", metavar="NAME",
              help="Network interface for NCCL and gloo; default: they choose.")
@click.option("--setup", metavar="LINE",
              help="Shell line that the script runs first, such as 'module load cuda'.")
@click.option("--sbatch", "extra", multiple=True, metavar="OPTION",
              help="A further option of sbatch, such as --exclusive. Can be repeated.")
@click.option("--assume-shared", is_flag=True,
              help="All nodes see the job's paths, whatever their file system is called.")
@click.option("--dry-run", is_flag=True, help="Check, show the script, submit nothing.")
@click.option("--no-follow", is_flag=True, help="Return once the job is in the queue.")
def slurm(job: str, overrides: tuple[str, ...], dry_run: bool, no_follow: bool,
          assume_shared: bool, **options: Any) -> int:
    """Check a job, submit it to Slurm, and show its output until it ends.

    Checked are the plan against the nodes' memory, paths and versions; what would fail is not
    submitted. Script and logs are in slurm/ of train.run_dir. Ends with the ranks' exit code.
    """
    config = read_job(job, False, overrides)
    from shardlab.launch.preflight import Nodes, absolute_paths, check
    from shardlab.launch.slurm import batch_script, follow, submit

    config = read_job(job, False, (*overrides, *absolute_paths(config)))
    asked = _slurm_job(Path(job), Path(str(config.train.run_dir)) / "slurm", options)
    if asked.most_nodes > asked.fewest_nodes and not config.train.elastic:
        raise ConfigError(f"--nodes {asked.nodes}: the number of ranks may change; allow it with "
                          "--set train.elastic=true")
    nodes = Nodes(asked.fewest_nodes, asked.ranks_per_node, asked.gpus_per_node > 0, assume_shared)
    for line in check(config, nodes):
        click.echo(line, err=True)
    if dry_run:
        click.echo(batch_script(asked), nl=False)
        return 0
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / "job.yaml").write_text(config.resolved_yaml(), encoding="utf-8")
    number = submit(asked)
    click.echo(f"submitted job {number}; logs in {asked.folder}", err=True)
    if no_follow:
        click.echo(number)
        return 0
    return follow(asked, number, lambda text: click.echo(text, nl=False))


def _slurm_job(path: Path, folder: Path, options: dict[str, Any]) -> Any:
    from shardlab.launch.local import rank_command
    from shardlab.launch.slurm import SlurmJob

    name = options.pop("name") or path.stem
    ranks = options.pop("ranks_per_node") or options["gpus_per_node"] or 1
    return SlurmJob(name=name, command=rank_command("train", str(folder / "job.yaml")),
                    folder=folder, ranks_per_node=ranks, **options)
