"""``shardlab export``, ``import`` and ``compact``: checkpoints and what others read."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
#: As `shardlab.interop.FORMATS`, which would cost importing torch to show a help text.
FORMATS = ("torch", "torchrec", "parquet", "npy", "safetensors")


@click.command()
@click.argument("checkpoint", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--format", "kind", required=True, type=click.Choice(FORMATS), help="What to write.")
@click.option("--tables", help="Only these tables, by name: user,item.")
@click.option("--quantize", type=click.Choice(["int8", "int4"]),
              help="Rows as codes with a scale and a bias; safetensors is what inference loads.")
def export(checkpoint: Path, out: Path, kind: str, tables: str | None,
           quantize: str | None) -> int:
    """Write the tables of CHECKPOINT for other programs.

    OUT is a folder that does not exist yet.
    """
    from shardlab.interop import export as write

    names = tuple(name.strip() for name in tables.split(",")) if tables else ()
    for path in write(checkpoint, out, kind, names, quantize):
        click.echo(f"{path}  {path.stat().st_size:,} bytes")
    return 0


@click.command("import")
@click.argument("source", type=_PATH)
@click.argument("out", type=_PATH)
@click.option("--optimizer", type=_PATH, help="The optimiser's state dict, if it is its own file.")
def import_(source: Path, out: Path, optimizer: Path | None) -> int:
    """Make the checkpoint OUT of TorchRec's tables.

    SOURCE is a torch.distributed.checkpoint folder, or a state dict that torch.save wrote. Go on
    with `shardlab train JOB.yaml --resume OUT`.
    """
    from shardlab.inspection import overview
    from shardlab.interop import import_torchrec
    from shardlab.train.checkpoint_reader import CheckpointReader

    found = overview(CheckpointReader(import_torchrec(source, out, optimizer)))
    click.echo(f"{out}: {len(found.tables)} tables, {found.file_bytes:,} bytes, state of "
               f"{found.optimizer}")
    return 0


@click.command()
@click.argument("checkpoint", type=_PATH)
def compact(checkpoint: Path) -> int:
    """Make an incremental CHECKPOINT a full one, in place.

    It can be loaded at any instant, also after a crash in between.
    """
    from shardlab.train.checkpoint_reader import CheckpointReader
    from shardlab.train.retention import compact as merge

    base = CheckpointReader(checkpoint).base
    merge(checkpoint)
    click.echo(f"{checkpoint} is a full checkpoint" if base is None else
               f"{checkpoint} no longer needs {base.path.name}")
    return 0
