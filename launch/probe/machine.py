"""From a probe's figures to a topology, with a comment for every number."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from shardlab.errors import LaunchError
from shardlab.launch.environment import available_cores
from shardlab.launch.local import start_local_ranks
from shardlab.launch.probe.compute import FEW_LAYERS, MANY_LAYERS
from shardlab.launch.probe.exchange import FEW_TABLES, MANY_TABLES, STEP_COLLECTIVES
from shardlab.launch.probe.memory import ROW_BYTES, RowFit, RowSpeed, fit_rows
from shardlab.launch.probe.rank import Options
from shardlab.planner.profiles import PROFILES, nearest_profile
from shardlab.planner.this_machine import ARENA_SHARE, machine_memory
from shardlab.planner.topology import Disk, Link, Memory, Topology
from shardlab.planner.topology_file import to_yaml

RESERVED_FRACTION = 0.10
#: Share of its core that every rank of a quiet machine gets.
_QUIET = 0.9
_GB = 1e9
Figures = dict[str, Any]
Comments = dict[str, str]


def measure(ranks: int, options: Options) -> Figures:
    """Starts ranks on this machine that measure it together.

    Args:
        ranks: how many.
        options: how much is measured.

    Raises:
        LaunchError: a rank failed, or a signal stopped them.
    """
    with tempfile.TemporaryDirectory(prefix="shardlab-probe-") as folder:
        asked, found = Path(folder) / "options.json", Path(folder) / "figures.json"
        asked.write_text(json.dumps(asdict(options)), encoding="utf-8")
        code = start_local_ranks(ranks, [sys.executable, "-m", "shardlab.launch.probe.rank",
                                         str(asked), str(found)])
        if code:
            raise LaunchError(f"the probe was stopped (exit code {code}); nothing was written")
        figures: Figures = json.loads(found.read_text(encoding="utf-8"))
    return figures


def describe(figures: Figures, name: str, quick: bool) -> tuple[Topology, str]:
    """The machine that was measured, and its YAML with a comment for every number.

    Args:
        figures: what `measure` returned.
        name: how reports call the machine.
        quick: says so in the file: the figures are rough.
    """
    ranks, cuda = figures["world_size"], figures["device"] == "cuda"
    likeness = nearest_profile(figures["gpu"], figures["gpu_bytes"]) if cuda else PROFILES["cpu"]
    comments: Comments = {}
    hbm = _memory(figures, "hbm", "hbm", comments)
    ddr = _memory(figures, "ddr", "ddr", comments) if cuda else hbm
    if not cuda:
        comments["ddr"] = "The same memory as hbm."
    hbm_bytes, ddr_bytes = _sizes(figures, ranks, comments)
    step, shard, layer = _overheads(figures, comments)
    encode, decode = (_rounded(mean(pair[i] for pair in figures["codec"])) for i in range(2))
    comments["encode_bytes_per_s"] = "torch's fp32 to fp16, 4 MiB."
    comments["decode_bytes_per_s"] = "torch's fp16 to fp32, 4 MiB."
    comments["fp32_flops_per_s"] = comments["bf16_flops_per_s"] = \
        "A fully connected layer, forward and backward; bf16 by autocast."
    comments["reserved_fraction"] = "Not measured: kept for the dense model, activations, readers."
    comments["inter_host"] = (f"Not measured: as in profile {likeness.name}; put in what your "
                              "network gives each rank.")
    topology = Topology(
        name=name, hosts=1, ranks_per_host=ranks, hbm_bytes=hbm_bytes, ddr_bytes=ddr_bytes,
        hbm=hbm, ddr=ddr, ssd=_disk(figures, comments),
        device_host=_copies(figures, comments) if cuda else None,
        intra_host=_messages(figures, likeness, comments), inter_host=likeness.inter_host,
        encode_bytes_per_s=encode, decode_bytes_per_s=decode,
        fp32_flops_per_s=_rounded(mean(figures["fp32_flops"])),
        bf16_flops_per_s=_rounded(mean(figures["bf16_flops"])),
        reserved_fraction=RESERVED_FRACTION, shard_overhead_s=shard, step_overhead_s=step,
        layer_overhead_s=layer)
    return topology, to_yaml(topology, comments, _header(figures, quick))


def _header(figures: Figures, quick: bool) -> str:
    what = figures.get("gpu") or f"{platform.processor() or platform.machine()}, " \
        f"{available_cores()} cores"
    rough = "\nMeasured with --quick: caches may have answered for memory; rough figures." \
        if quick else ""
    rough += "".join(f"\n{line}" for line in warnings(figures))
    return (f"Measured by `shardlab probe` on {what}: {figures['world_size']} ranks of "
            f"{figures['threads']} threads, all of them at the same time." + rough)


def warnings(figures: Figures) -> list[str]:
    """What makes the figures doubtful."""
    share = min(figures["core_share"])
    if share >= _QUIET:
        return []
    return [f"The machine was busy: a rank got {share:.0%} of its core. Figures are too slow; "
            "probe a quiet machine."]


def _rounded(value: float) -> float:
    """Three significant digits: more than the measurement is good for."""
    return float(f"{value:.3g}")


def _memory(figures: Figures, key: str, field: str, comments: Comments) -> Memory:
    """Means over the ranks, each measured while the others measured too."""
    stream = mean(figures[f"{key}_stream"])
    speeds = [RowSpeed(size, *(mean(speed[part] for speed in figures[f"{key}_rows_{size}"])
                               for part in ("read_s", "update_s"))) for size in ROW_BYTES]
    fit: RowFit = fit_rows(speeds)
    comments[f"{field}.stream_bytes_per_s"] = "A large copy, bytes read and written."
    shown = "\n".join(f"  {speed.row_bytes} B: {1e-6 / speed.read_s:.3g} M/s read, "
                      f"{1e-6 / speed.update_s:.3g} M/s stepped" for speed in speeds)
    comments[f"{field}.rows_per_s"] = (
        "A line through random rows in ascending order, read and stepped by row-wise Adagrad,\n"
        f"without the copies beside them (largest error {fit.error:.0%}):\n{shown}")
    comments[f"{field}.ids_per_s"] = "unique_segments: 26 features of 2,048 Zipf ids."
    return Memory(stream_bytes_per_s=_rounded(stream), rows_per_s=_rounded(fit.rows_per_s),
                  row_bytes_per_s=_rounded(fit.row_bytes_per_s),
                  ids_per_s=_rounded(mean(figures[f"{key}_ids"])),
                  rewrite_factor=_rounded(fit.rewrite_factor))


def _sizes(figures: Figures, ranks: int, comments: Comments) -> tuple[int, int]:
    """Bytes of a rank's hbm, and of the host's ddr."""
    memory = machine_memory()
    comments["ddr_bytes"] = "Memory of this machine, or of its container's limit."
    if figures["device"] == "cuda":
        comments["hbm_bytes"] = "What CUDA reports."
        return int(figures["gpu_bytes"]), memory
    arenas = int(memory * ARENA_SHARE)
    comments["hbm_bytes"] = (f"{ARENA_SHARE:.0%} of this machine's memory for the ranks' arenas; "
                             "the rest is the ddr tier.")
    comments["ddr_bytes"] = "Host memory outside the arenas."
    return arenas // ranks, memory - arenas


def _overheads(figures: Figures, comments: Comments) -> tuple[float, float, float]:
    """Seconds of a step, of a shard in it and of a dense layer, beside what moves bytes."""
    step, few, many = (mean(figures[key]) for key in ("step", "few_tables", "many_tables"))
    waits = STEP_COLLECTIVES * figures["messages"][0][0][1] if "messages" in figures else 0.0
    comments["step_overhead_s"] = (f"A step of one id of one table takes {step * 1e6:.0f} us, "
                                   f"{waits * 1e6:.0f} us of it in empty exchanges.")
    comments["shard_overhead_s"] = (
        f"On a rank alone: {FEW_TABLES} table {few * 1e6:.0f} us, {MANY_TABLES} tables "
        f"{many * 1e6:.0f} us.")
    flat, deep = (mean(figures[key]) for key in ("few_layers", "many_layers"))
    comments["layer_overhead_s"] = (
        f"Layers of 64 x 64, batch 64: a step of {FEW_LAYERS} takes {flat * 1e6:.0f} us, of "
        f"{MANY_LAYERS} {deep * 1e6:.0f} us.")
    # Exchanges wait for the other ranks too, and may do so for longer than the step has.
    return (_rounded(max(step - waits, few)),
            _rounded(max(many - few, 0.0) / (MANY_TABLES - FEW_TABLES)),
            _rounded(max(deep - flat, 0.0) / (MANY_LAYERS - FEW_LAYERS)))


def _link(points: Sequence[tuple[float, float]], peers: int) -> Link:
    """A curve through (bytes of a message, seconds of one to each of ``peers``).

    The first, all but empty, message gives the latency; what the others take beside it is theirs.
    """
    latency = points[0][1]
    curve = [(size, _rounded(peers * size / (took - latency)))
             for size, took in points[1:] if took > latency]
    if not curve:
        raise LaunchError(f"probe: messages of {points[-1][0]:.0f} B took no longer than empty "
                          "ones; the machine is too busy to measure, run the probe again")
    return Link(tuple(curve), _rounded(latency / peers))


def _messages(figures: Figures, likeness: Topology, comments: Comments) -> Link:
    if "messages" not in figures:
        comments["intra_host"] = (f"Not measured, there was one rank: as in profile "
                                  f"{likeness.name}.")
        return likeness.intra_host
    points, peers = figures["messages"][0], figures["world_size"] - 1
    comments["intra_host"] = "All-to-all; message to each other rank: time of one.\n" + "\n".join(
        f"  {size:,} B: {took * 1e6:.0f} us" for size, took in points)
    return _link(points, peers)


def _copies(figures: Figures, comments: Comments) -> Link:
    """The slowest rank's copies, the ranks copying at the same time."""
    points = [(sizes[0][0], max(took for _, took in sizes))
              for sizes in zip(*figures["copies"], strict=True)]
    comments["device_host"] = "From page-locked host memory to the device.\n" + "\n".join(
        f"  {size:,} B: {took * 1e6:.0f} us" for size, took in points)
    return _link(points, 1)


def _disk(figures: Figures, comments: Comments) -> Disk | None:
    found = next((speed for speed in figures.get("disk", []) if speed is not None), None)
    if found is None:
        comments["ssd"] = "Not measured: give --ssd DIR."
        return None
    best = max(iops for _, iops in found["read_iops"])
    comments["ssd"] = f"The SSD tier: {found['engine']}."
    comments["ssd.capacity_bytes"] = "Free space of the file system."
    comments["ssd.read_iops"] = "Random pages of 4 KiB; requests in flight: reads per second.\n" + \
        "\n".join(f"  {depth}: {iops:,.0f}" for depth, iops in found["read_iops"])
    comments["ssd.write_iops"] = "Random whole pages."
    comments["ssd.read_bytes_per_s"] = "Runs of 32 MiB."
    comments["ssd.write_bytes_per_s"] = "Runs of 32 MiB, until they last."
    comments["ssd.endurance_bytes"] = "Not measured: total bytes written, from its data sheet."
    return Disk(capacity_bytes=int(found["free_bytes"]), read_iops=_rounded(best),
                write_iops=_rounded(found["write_iops"]),
                read_bytes_per_s=_rounded(found["read_bytes_per_s"]),
                write_bytes_per_s=_rounded(found["write_bytes_per_s"]))
