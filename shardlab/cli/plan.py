"""``shardlab plan``: where every table of a job would go, without running it, without torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardlab.cli.job import job_arguments, read_job
from shardlab.errors import USER_ERROR, ConfigError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from shardlab.config import JobConfig
    from shardlab.plan import ShardingPlan
    from shardlab.planner import Topology
    from shardlab.planner.request import Request
    from shardlab.planner.result import PlanResult

_PIPE_WIDTH = 160
_FILE = click.Path(dir_okay=False, writable=True)


@dataclass(frozen=True)
class _Asked:
    """The command line beside the job's own arguments; see the options' help."""

    topology: str | None
    replicas: int | None
    stats: str | None
    json_file: str | None
    html_file: str | None
    explain: tuple[str, ...]
    what_if: tuple[str, ...]
    compare: str | None
    torchrec: str | None
    time_limit: float | None
    everything: bool


@click.command()
@job_arguments
@click.option("--topology", metavar="NAME|FILE",
              help="Machine to plan for, such as 8xh100, 16x8xa100-80gb or a YAML file; default: "
                   "the job's, else --ranks ranks of this machine.")
@click.option("--replicas", metavar="R", type=click.IntRange(min=1),
              help="Groups of ranks that each hold all tables; default: the job's.")
@click.option("--stats", metavar="FILE",
              help="Ids as `shardlab stats` measured them; default: the job's, else a Zipf "
                   "assumption.")
@click.option("--json", "json_file", metavar="FILE", type=_FILE,
              help="Also write the plan with its predictions; `shardlab train --plan` reads it.")
@click.option("--html", "html_file", metavar="FILE", type=_FILE,
              help="Also write the report as a page with charts, in one file.")
@click.option("--explain", metavar="TABLE", multiple=True,
              help="Why this table lies where it lies, what else it could get, and what would "
                   "change it. Can be repeated.")
@click.option("--what-if", metavar="CHANGES", multiple=True,
              help="Plan again with something changed, such as hosts=+1, wire=bf16, 'no ssd', "
                   "hbm_bytes=x2, batch_size=4096; several in one text go together. Can be "
                   "repeated.")
@click.option("--compare", metavar="PLAN.json|RUN",
              help="Lay another plan beside this one; or, for a run's folder, what it measured "
                   "beside what was predicted.")
@click.option("--import-torchrec", "torchrec", metavar="FILE",
              help="Take this TorchRec plan (JSON of examples/torchrec_plan_to_json.py) instead "
                   "of planning.")
@click.option("--time-limit", metavar="SECONDS", type=click.FloatRange(min=0, min_open=True),
              help="CPU seconds after which the search takes the best plan it has.")
@click.option("--all", "everything", is_flag=True, help="Show every rank and table.")
def plan(job: str | None, demo: bool, ranks: int | None, overrides: tuple[str, ...],
         **options: object) -> int:
    """Show where tables would go, what ranks would hold and do.

    Exit code 2 where nothing fits: the message says what, by how much, and what would help.
    """
    asked = _Asked(**options)  # type: ignore[arg-type]
    run = Path(asked.compare) if asked.compare and Path(asked.compare).is_dir() else None
    if run is not None and job is None and not demo:
        job = str(run / "job.yaml")

    groups = [] if asked.replicas is None else [f"parallel.replicas={asked.replicas}"]

    def load(*more: str) -> JobConfig:
        return read_job(job, demo, (*overrides, *groups, *more), files=False, ranks=ranks,
                        topology=asked.topology, statistics=asked.stats)

    if run is not None:
        return _compare_run(run, load, asked, ranks)
    from shardlab.launch.planning import job_request
    from shardlab.planner.rate import overfull

    config = load()
    machine = _machine(config, ranks)
    given = _given(config, machine, asked)
    request = job_request(config, machine, asked.time_limit, given)
    result = _make(given, request, asked)
    written = _write(result, asked)  # before the report, whose reader may be gone early: `| head`
    _show(request, result, asked,
          lambda changes, given=None: job_request(load(*changes), machine, asked.time_limit,
                                                  given))
    for line in written:
        click.echo(line)
    return USER_ERROR if overfull(result) else 0


def _given(config: JobConfig, machine: Topology, asked: _Asked) -> ShardingPlan | None:
    """The plan that the job executes, which is then only rated; None: the planner makes one."""
    from shardlab.launch.planning import read_job_plan

    if config.plan is None or asked.torchrec is not None:
        return None
    if asked.what_if or asked.explain:
        raise ConfigError(f"plan: the job executes {config.plan}, so that nothing is chosen; "
                          "--set plan= plans anew")
    return read_job_plan(Path(config.plan), config, machine.world_size)


def _make(given: ShardingPlan | None, request: Request, asked: _Asked) -> PlanResult:
    """The planner's plan; or a given one, with what is predicted for it."""
    from shardlab.launch.planning import plan_request
    from shardlab.planner.rate import choose_exchanges, rate

    if asked.torchrec is not None:
        from shardlab.planner.torchrec_plan import read_torchrec_plan

        theirs = read_torchrec_plan(Path(asked.torchrec), request.tables,
                                    request.topology.world_size)
        replicas = request.settings.replicas
        theirs = theirs.with_replicas(replicas.groups, replicas.sync_every_steps)
        return rate(choose_exchanges(theirs, request), request)
    return plan_request(request) if given is None else rate(given, request)


def _show(request: Request, result: PlanResult, asked: _Asked,
          rebuild: Callable[..., Request]) -> None:
    """Prints what was asked for: explanations, scenarios, a comparison, or the whole report."""
    from shardlab.planner.report import print_report

    console = _console()
    for table in asked.explain:
        from shardlab.planner.explain import print_explanation

        if result.solved is None:
            raise ConfigError("--explain: the plan is given, nothing was chosen; leave "
                              "--import-torchrec out")
        print_explanation(console, request, result, table)
    if asked.what_if:
        from shardlab.planner.what_if import print_outcomes, run_scenario

        print_outcomes(console, result, [run_scenario(scenario, request, rebuild)
                                         for scenario in asked.what_if])
    if asked.compare is not None:
        _compare_plan(console, Path(asked.compare), rebuild, result)
    if not (asked.explain or asked.what_if or asked.compare):
        print_report(result, width=console.width, everything=asked.everything)
        _show_hierarchy(console, request, result)


def _show_hierarchy(console: Console, request: Request, result: PlanResult) -> None:
    """Whether an exchange in two stages would pay, where there are several hosts."""
    if request.topology.hosts > 1 and request.topology.ranks_per_host > 1:
        from shardlab.planner.hierarchy import compare_hierarchies

        costs = compare_hierarchies(result.plan, request)
        way = "two_stage" if costs.two_stage_pays else "flat"
        console.print(f"exchange.hierarchy auto: {way}; {costs.in_words()}")


def _compare_plan(console: Console, path: Path, rebuild: Callable[..., Request],
                  result: PlanResult) -> None:
    from shardlab.planner.compare import print_plans
    from shardlab.planner.plan_file import read_plan_file
    from shardlab.planner.rate import rate

    other, _ = read_plan_file(path)
    try:
        rated = rate(other, rebuild([], other))
    except PlanError as error:
        raise PlanError(f"--compare {path}: {error}") from None
    print_plans(console, result, rated, path.name)


def _compare_run(path: Path, load: Callable[..., JobConfig], asked: _Asked,
                 ranks: int | None) -> int:
    """Predicted beside measured; with another machine or other statistics predicted anew."""
    from shardlab.planner.compare import print_measured, read_run
    from shardlab.planner.plan_file import prediction_of, read_plan_file

    measured = read_run(path)
    executed, predicted = read_plan_file(path / "plan.json")
    if asked.topology or asked.stats or predicted is None:
        from shardlab.launch.planning import job_request
        from shardlab.planner.rate import rate

        config = load("plan=")
        predicted = prediction_of(rate(executed, job_request(config, _machine(config, ranks),
                                                             given=executed)))
    print_measured(_console(), predicted, measured)
    return 0


def _console() -> Console:
    from rich.console import Console

    # Wide where it goes to a file or a pipe: the tables would else be folded at 80 columns.
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False,
                   markup=False)


def _write(result: PlanResult, asked: _Asked) -> list[str]:
    """Writes the files that were asked for; returns what to tell of them."""
    written = []
    if asked.json_file is not None:
        from shardlab.planner.plan_file import plan_to_json

        _write_file("--json", asked.json_file, plan_to_json(result))
        written.append(f"plan written to {asked.json_file}")
    if asked.html_file is not None:
        from shardlab.planner.html import plan_to_html

        _write_file("--html", asked.html_file, plan_to_html(result))
        written.append(f"page written to {asked.html_file}")
    return written


def _write_file(option: str, path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written: {error.strerror}") from None


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
