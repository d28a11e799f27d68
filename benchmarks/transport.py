"""All-to-all and sums between ranks of this host: shared memory beside gloo, in one run.

    python benchmarks/transport.py [--ranks 2] [--repeats 40]

Both move the same tensors in turns, so that both meet the same neighbours. Prints one JSON line per
message size: of an all-to-all the bytes sent per rank and second, of an all-reduce milliseconds;
medians over all repeats, and the ratio.
Every result is checked against what the peers sent.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchlib import emit, machine

from shardlab import comm
from shardlab.comm.lanes import Lane, TorchLane

SIZES = [4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20]
FLOAT_BYTES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    mp.spawn(run_rank, (options.ranks, options.repeats), options.ranks)


def run_rank(rank: int, ranks: int, repeats: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    groups = comm.init(transport="shared_memory")
    lanes: dict[str, Lane | None] = {
        "gloo": TorchLane(dist.new_group(), groups.timeout_s), "shared_memory": groups.exchange}
    for size in SIZES:
        seconds = {name: [] for name in lanes}
        count = size // FLOAT_BYTES
        source = torch.full((count * (ranks - 1),), float(rank))
        out = torch.zeros_like(source)
        for repeat in range(repeats + 2):
            for name, lane in lanes.items():
                passed = exchange(lane, out, source, groups)
                if repeat >= 2:  # the first ones take memory from the system
                    seconds[name].append(passed)
        if rank == 0:
            rates = {name: size * (ranks - 1) / statistics.median(taken) / 1e9
                     for name, taken in seconds.items()}
            best = {name: size * (ranks - 1) / min(taken) / 1e9 for name, taken in seconds.items()}
            emit(op="all_to_all", ranks=ranks, message_bytes=size, repeats=repeats,
                 gb_per_s=rates, best_gb_per_s=best,
                 ratio=rates["shared_memory"] / rates["gloo"],
                 best_ratio=best["shared_memory"] / best["gloo"])
    for size in SIZES:
        compare_sums(size, repeats, groups)
    if rank == 0:
        emit(machine=machine())
    comm.shutdown()


def compare_sums(size: int, repeats: int, groups: comm.Groups) -> None:
    """Emits the milliseconds of an all-reduce of ``size`` bytes."""
    ways = {"gloo": replace(groups, sums=None), "shared_memory": groups}
    ms: dict[str, list[float]] = {name: [] for name in ways}
    start = torch.arange(size // FLOAT_BYTES, dtype=torch.float32)
    total = start * (groups.world_size * (groups.world_size + 1) / 2)
    for repeat in range(repeats + 2):
        for name, way in ways.items():
            tensor = start * (groups.rank + 1)
            comm.barrier(groups)
            begin = time.perf_counter()
            comm.start_all_reduce(tensor, way).wait()
            passed = time.perf_counter() - begin
            torch.testing.assert_close(tensor, total)
            if repeat >= 2:
                ms[name].append(1000 * passed)
    if groups.rank == 0:
        medians = {name: statistics.median(taken) for name, taken in ms.items()}
        emit(op="all_reduce", ranks=groups.world_size, message_bytes=size, repeats=repeats,
             ms=medians, ratio=medians["gloo"] / medians["shared_memory"])


def exchange(lane: Lane | None, out: torch.Tensor, source: torch.Tensor,
             groups: comm.Groups) -> float:
    """Seconds of one all-to-all of equal parts to all other ranks."""
    assert lane is not None
    rank, others = groups.rank, groups.world_size - 1
    count = source.numel() // others
    splits = [0 if peer == rank else count for peer in range(others + 1)]
    out.fill_(-1)
    comm.barrier(groups)
    start = time.perf_counter()
    lane.all_to_all(out, source, splits, splits)()
    passed = time.perf_counter() - start
    senders = torch.tensor([peer for peer in range(others + 1) if peer != rank])
    assert bool((out.view(others, count) == senders[:, None]).all()), "wrong bytes arrived"
    return passed


if __name__ == "__main__":
    main()
