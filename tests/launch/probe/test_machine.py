"""Figures become a topology with a comment for every number; ranks measure together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shardlab.errors import LaunchError
from shardlab.launch.probe.machine import describe, measure, warnings
from shardlab.launch.probe.memory import ROW_BYTES
from shardlab.launch.probe.rank import Options
from shardlab.planner import plan
from shardlab.planner.topology_file import read_topology
from shardlab.specs import EmbeddingBagConfig


def figures(ranks: int = 2, **changes: Any) -> dict[str, Any]:
    """What two CPU ranks might measure."""
    rows = {f"hbm_rows_{size}": [{"row_bytes": size, "read_s": 1e-8 + size * 1e-10,
                                  "update_s": 2e-8 + size * 2e-10}] * ranks for size in ROW_BYTES}
    found = {"world_size": ranks, "device": "cpu", "threads": 1, "hbm_stream": [1e10, 3e10],
             "hbm_ids": [1e8] * ranks, **rows, "fp32_flops": [1e11] * ranks,
             "bf16_flops": [2e11] * ranks, "codec": [[6e10, 7e10]] * ranks, "step": [2e-3] * ranks,
             "few_tables": [1e-3] * ranks, "many_tables": [1e-3 + 32e-6] * ranks,
             "few_layers": [2e-4] * ranks, "many_layers": [1e-3] * ranks,
             "messages": [[[8, 1e-4], [4096, 1.5e-4], [1 << 20, 1.1e-3]]] * ranks,
             "core_share": [0.99, 0.97]}
    return {**found, **changes}


def test_numbers_are_means_with_their_comments(tmp_path: Path) -> None:
    topology, text = describe(figures(), "here", quick=False)
    path = tmp_path / "here.yaml"
    path.write_text(text)
    assert read_topology(path) == topology
    assert (topology.world_size, topology.ssd, topology.device_host) == (2, None, None)
    assert topology.hbm.stream_bytes_per_s == 2e10
    assert topology.hbm.rewrite_factor == pytest.approx(2.0, rel=0.05)
    assert topology.intra_host.latency_s == 1e-4
    assert float(topology.intra_host.seconds(1 << 20)) == pytest.approx(1.1e-3, rel=0.01)
    assert topology.shard_overhead_s == pytest.approx(1e-6)
    assert topology.layer_overhead_s == pytest.approx(1e-4)
    # 2 ms, less four empty exchanges of 0.1 ms.
    assert topology.step_overhead_s == pytest.approx(1.6e-3)
    assert "Not measured: give --ssd DIR." in text
    assert "A step of one id of one table takes 2000 us, 400 us of it in empty exchanges." in text
    assert "rough figures" not in text
    assert "busy" not in text
    lines = text.splitlines()
    bare = [line for above, line in pairwise(lines)
            if ": " in line and not line.lstrip().startswith("#") and "_s:" in line
            and not above.lstrip().startswith("#") and not line.startswith("  ")]
    assert bare == []  # every speed of the machine says where it comes from


def test_one_rank_takes_the_links_of_the_nearest_profile() -> None:
    alone = {key: value[:1] if isinstance(value, list) else value
             for key, value in figures().items() if key != "messages"}
    topology, text = describe({**alone, "world_size": 1}, "one", quick=True)
    assert topology.intra_host == read_topology("cpu").intra_host
    assert "Not measured, there was one rank: as in profile cpu." in text
    assert "rough figures" in text
    assert plan([EmbeddingBagConfig(1000, 8, "t")], topology, 64).step_ms > 0


def test_disks_and_devices_are_described() -> None:
    disk = {"engine": "io_uring", "free_bytes": 10**12, "read_iops": [[1, 1e4], [64, 9e4]],
            "write_iops": 8e4, "read_bytes_per_s": 2e9, "write_bytes_per_s": 1e9}
    gpu = {key.replace("hbm", "ddr"): value for key, value in figures().items()
           if key.startswith("hbm")}
    found, text = describe(figures(
        device="cuda", gpu="NVIDIA H200", gpu_bytes=150 * 10**9, disk=[disk, None], **gpu,
        copies=[[[4096, 2e-5], [1 << 20, 6e-5]]] * 2), "gpus", quick=False)
    assert found.ssd is not None
    assert (found.ssd.read_iops, found.ssd.endurance_bytes) == (9e4, None)
    assert found.hbm_bytes == 150 * 10**9
    assert found.device_host is not None
    assert found.device_host.latency_s == 2e-5
    assert "as in profile h200" in text
    assert "The SSD tier: io_uring." in text


def test_busy_machines_are_told() -> None:
    assert warnings(figures()) == []
    busy = figures(core_share=[0.95, 0.5])
    assert warnings(busy) == ["The machine was busy: a rank got 50% of its core. Figures are too "
                              "slow; probe a quiet machine."]
    assert "# The machine was busy" in describe(busy, "x", quick=False)[1]
    with pytest.raises(LaunchError, match="the machine is too busy to measure"):
        describe(figures(messages=[[[8, 1e-3], [4096, 9e-4]]]), "x", quick=False)


def test_two_ranks_measure_everything_together(tmp_path: Path) -> None:
    found = measure(2, Options(0.0, 1 << 16, 1 << 16, 1 << 20, 32 << 20, str(tmp_path)))
    topology, _ = describe(found, "small", quick=True)
    assert topology.world_size == 2
    assert topology.ssd is not None
    assert list(tmp_path.iterdir()) == []
