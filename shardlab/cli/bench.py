"""``shardlab bench``: how fast this machine trains tables of a given shape, in half a minute."""

from __future__ import annotations

from typing import Any

import click

from shardlab.words import counted

#: Names of `shardlab.storage_bytes.OPTIMIZER_STATE`, written out so that --help imports little.
_OPTIMIZERS = ("sgd", "adagrad", "row_wise_adagrad", "adam", "row_wise_adam")
_AT_LEAST_1 = click.IntRange(min=1)


@click.command()
@click.option("--tables", type=_AT_LEAST_1, default=8, show_default=True, help="Tables.")
@click.option("--rows", type=_AT_LEAST_1, default=250_000, show_default=True,
              help="Rows of each table.")
@click.option("--dim", type=_AT_LEAST_1, default=64, show_default=True,
              help="Columns of each table.")
@click.option("--batch-size", type=_AT_LEAST_1, default=2048, show_default=True,
              help="Samples of a step.")
@click.option("--pooling-factor", type=_AT_LEAST_1, default=10, show_default=True,
              help="Ids of each bag.")
@click.option("--optimizer", type=click.Choice(_OPTIMIZERS), default="row_wise_adagrad",
              show_default=True, help="Update rule.")
@click.option("--seconds", type=click.FloatRange(min=0), default=3.0, show_default=True,
              help="Time of each measurement.")
def bench(seconds: float, **options: Any) -> int:
    """Measure memory bandwidth and a step of embedding tables.

    Lookup, backward and fused update, in one process with as many threads as OMP_NUM_THREADS
    says. For a comparison with other libraries see benchmarks/.
    """
    from dataclasses import asdict

    import torch
    from rich.console import Console
    from rich.table import Table

    from shardlab.launch.speed import Shape, measure

    shape = Shape(**options)
    console = Console()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    named = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(shape).items())
    table = Table("measurement", title=f"{where}: {named}", title_justify="left")
    for heading in ("ms, median", "million rows/s", "GB/s"):
        table.add_column(heading, justify="right")
    with console.status("measuring"):
        for speed in measure(shape, seconds):
            rows = f"{speed.rows_per_s / 1e6:,.2f}" if speed.rows else "-"
            table.add_row(speed.name, f"{speed.ms:,.3f}", rows, f"{speed.bytes_per_s / 1e9:,.2f}")
    console.print(table)
    return 0
