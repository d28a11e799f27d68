"""The ``shardlab`` command. A user's mistake ends in a message and exit code 2, no traceback."""

from __future__ import annotations

import sys

import click

from shardlab.cli.bench import bench
from shardlab.cli.doctor import doctor
from shardlab.cli.export import compact, export, import_
from shardlab.cli.inspect import inspect
from shardlab.cli.launch import launch
from shardlab.cli.plan import plan
from shardlab.cli.probe import probe
from shardlab.cli.stats import stats
from shardlab.cli.train import train
from shardlab.errors import ShardLabError, nearest_name

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


class _Commands(click.Group):
    """A group that suggests the nearest command for a misspelt one, and keeps their order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str],
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            known = list(self.commands)
            ctx.fail(f"no command {args[0]!r}{nearest_name(args[0], known)}; "
                     f"known: {', '.join(known)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]},
             epilog="Start with `shardlab train --demo`. docs/job_file.md has every key of a job.")
@click.version_option(package_name="shardlab")
def app() -> None:
    """Train recommendation models whose embedding tables outgrow a device."""


for _command in (train, launch, plan, probe, stats, inspect, export, import_, compact, doctor,
                 bench):
    app.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Runs ``shardlab`` and exits.

    Args:
        arguments: what follows the program's name; None takes this process's.
    """
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        return int(app.main(arguments, prog_name="shardlab", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except ShardLabError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
