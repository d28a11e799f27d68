"""``shardlab probe``: measures this machine and writes it as a topology for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from shardlab.planner import Topology


@click.command()
@click.option("-o", "--output", required=True, metavar="FILE.yaml",
              type=click.Path(dir_okay=False, writable=True),
              help="Topology file to write; `shardlab plan --topology` reads it.")
@click.option("--ranks", type=click.IntRange(min=1), metavar="N",
              help="Ranks that measure at the same time; default: one per GPU, or 2 on CPUs.")
@click.option("--ssd", metavar="DIR", type=click.Path(),
              help="Also measure the disk that this directory lies on, with a file of 1 GiB.")
@click.option("--quick", is_flag=True, help="Rough figures in seconds, to try things out.")
def probe(output: str, ranks: int | None, ssd: str | None, quick: bool) -> int:
    """Measure this machine for the planner, in about a minute.

    Memory, exchange, products and, with --ssd, the disk. Run it while nothing else runs: all
    figures are those of ranks that work at the same time.
    """
    from shardlab.errors import ConfigError

    target = Path(output)
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"-o {output}: a topology file's name ends in .yaml or .yml")
    if not target.parent.is_dir():
        raise ConfigError(f"-o {output}: no such directory: {target.parent}")
    from rich.console import Console

    from shardlab.launch.probe.machine import describe, measure, warnings
    from shardlab.launch.probe.rank import Options

    options = Options.quick(ssd) if quick else Options.full(ssd)
    figures = measure(ranks or _default_ranks(), options)
    topology, text = describe(figures, target.stem, quick)
    target.write_text(text, encoding="utf-8")
    Console().print(_table(topology))
    for line in warnings(figures):
        click.echo(f"warning: {line}", err=True)
    click.echo(f"topology written to {output}")
    return 0


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() or 2


def _table(topology: Topology) -> Table:
    from rich.table import Table

    from shardlab.planner.units import format_bytes, format_ms

    giga = 1e9
    rows = [
        ("memory of a rank", f"{format_bytes(topology.hbm_bytes)}, streams "
                             f"{topology.hbm.stream_bytes_per_s / giga:.3g} GB/s"),
        ("random rows", ", ".join(
            f"{size} B {1e-6 / float(topology.hbm.row_seconds(size)):.3g} M/s"
            for size in (64, 256, 512))),
        ("ids de-duplicated", f"{topology.hbm.ids_per_s / 1e6:.3g} M/s"),
        ("ranks of a host", f"{topology.intra_host.latency_s * 1e6:.3g} us a message, "
                            f"{topology.intra_host.bytes_per_s / giga:.3g} GB/s for large ones"),
        ("products", f"fp32 {topology.fp32_flops_per_s / giga:,.0f} GFLOP/s, bf16 "
                     f"{topology.bf16_flops_per_s / giga:,.0f} GFLOP/s"),
        ("a step's overhead", f"{format_ms(1e3 * topology.step_overhead_s)}, each shard "
                              f"{format_ms(1e3 * topology.shard_overhead_s)}, each dense layer "
                              f"{format_ms(1e3 * topology.layer_overhead_s)}")]
    if topology.device_host is not None:
        rows.append(("device and host", f"{topology.device_host.bytes_per_s / giga:.3g} GB/s"))
    if topology.ssd is not None:
        rows.append(("disk", f"{format_bytes(topology.ssd.capacity_bytes)} free, "
                             f"{topology.ssd.read_iops:,.0f} page reads/s, writes "
                             f"{topology.ssd.write_bytes_per_s / giga:.3g} GB/s"))
    table = Table(title=f"{topology.name}: {topology.world_size} ranks", title_justify="left",
                  show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
