"""What every rank of a probe does. Rank 0 shows progress and writes all figures to a file.

    python -m shardlab.launch.probe.rank OPTIONS.json FIGURES.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn

from shardlab import comm
from shardlab.comm import Groups
from shardlab.launch.probe import compute, disk, exchange, memory
from shardlab.launch.probe.timing import CoreTime
from shardlab.launch.rank import guarded

_MIB = 1 << 20


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        seconds: how long each measurement repeats.
        arena_bytes: memory of each rank that random rows are read from.
        stream_bytes: memory that is copied.
        message_bytes: largest message of an all-to-all to one peer.
        disk_bytes: size of the file that measures a disk.
        ssd: directory on the disk to measure; None: no disk.
    """

    seconds: float
    arena_bytes: int
    stream_bytes: int
    message_bytes: int
    disk_bytes: int
    ssd: str | None = None

    @staticmethod
    def full(ssd: str | None) -> Options:
        """About a minute."""
        return Options(1.5, 1024 * _MIB, 256 * _MIB, 16 * _MIB, 1024 * _MIB, ssd)

    @staticmethod
    def quick(ssd: str | None) -> Options:
        """Seconds; caches may answer for memory, so the figures are rough."""
        return Options(0.05, 32 * _MIB, 32 * _MIB, 256 << 10, 64 * _MIB, ssd)


#: Measurements in which a rank does nothing but compute.
_ALONE = {"hbm_stream", "hbm_ids", *(f"hbm_rows_{size}" for size in memory.ROW_BYTES)}

Measurement = tuple[str, str, Callable[[], Any]]


def measurements(options: Options, groups: Groups) -> list[Measurement]:
    """(key of the figure, words for it, what measures it), in order; the same on every rank."""
    device, host, time = groups.device, torch.device("cpu"), options.seconds
    found = [*_memory("hbm", "memory", device, options)]
    if device.type == "cuda":
        found += [*_memory("ddr", "host memory", host, options),
                  ("copies", "copies to the device", lambda: compute.copy_seconds(device, time))]
    found += [
        ("fp32_flops", "fp32 products",
         lambda: compute.flops_per_s(device, torch.float32, time)),
        ("bf16_flops", "bf16 products",
         lambda: compute.flops_per_s(device, torch.bfloat16, time)),
        ("codec", "changes of precision", lambda: compute.codec_bytes_per_s(device, time)),
        *((key, "overhead of layers", lambda count=count: compute.layers_seconds(
            device, count, time))
          for key, count in (("few_layers", compute.FEW_LAYERS),
                             ("many_layers", compute.MANY_LAYERS))),
        ("step", "overhead of a step",
         lambda: exchange.step_seconds(groups, exchange.FEW_TABLES, time)),
        *((key, "overhead of shards", lambda count=count: exchange.step_seconds(
            Groups(device=device), count, time))
          for key, count in (("few_tables", exchange.FEW_TABLES),
                             ("many_tables", exchange.MANY_TABLES)))]
    if groups.world_size > 1:
        found.append(("messages", "all-to-all", lambda: exchange.all_to_all_seconds(
            groups, options.message_bytes, time)))
    if options.ssd is not None:
        folder = options.ssd
        found.append(("disk", "disk", lambda: None if groups.rank else asdict(
            disk.disk_speed(folder, options.disk_bytes, time))))
    return found


def _memory(key: str, words: str, device: torch.device, options: Options) -> list[Measurement]:
    time = options.seconds

    def measure_rows(size: int) -> dict[str, float]:
        return asdict(memory.row_speed(device, size, options.arena_bytes, time))

    rows: list[Measurement] = [
        (f"{key}_rows_{size}", f"{words}, random rows of {size} B", partial(measure_rows, size))
        for size in memory.ROW_BYTES]
    return [(f"{key}_stream", f"{words}, streams",
             lambda: memory.stream_bytes_per_s(device, options.stream_bytes, time)), *rows,
            (f"{key}_ids", "ids", lambda: memory.ids_per_s(device, time))]


def run(options: Options, target: Path) -> int:
    """Measures everything, all ranks at the same time; rank 0 writes {key: [figure by rank]}."""
    groups = comm.init()
    figures: dict[str, Any] = {"world_size": groups.world_size, "device": groups.device.type,
                               "threads": torch.get_num_threads()}
    if groups.device.type == "cuda":
        found = torch.cuda.get_device_properties(groups.device)
        figures.update(gpu=found.name, gpu_bytes=found.total_memory)
    work, core = measurements(options, groups), CoreTime()
    with Progress("measuring {task.description}", BarColumn(), TimeElapsedColumn(),
                  console=Console(stderr=True), transient=True,
                  disable=groups.rank != 0) as progress:
        task = progress.add_task("", total=len(work))
        for key, words, measure in work:
            progress.update(task, description=words)
            comm.barrier(groups)
            with core.watching(key in _ALONE):
                found = measure()
            figures[key] = comm.gather_objects_json(found, groups)
            progress.advance(task)
        figures["core_share"] = comm.gather_objects_json(core.share, groups)
    if groups.rank == 0:
        target.write_text(json.dumps(figures), encoding="utf-8")
    comm.shutdown()
    return 0


def _main() -> NoReturn:
    options = Options(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    guarded(lambda: run(options, Path(sys.argv[2])))


if __name__ == "__main__":
    _main()
