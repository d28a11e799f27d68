"""Replica groups on hosts behind slow links: bytes on the link and time of a step.

    sudo python benchmarks/replicas.py [--hosts 2] [--ranks-per-host 2] [--mbit 1000 200]

Hosts are network namespaces of this machine (tests/hosts.py). All layouts train the same batches in
turns in one job: one group of all ranks; a group per host, gradients merged in every step; the
same, rows averaged every 16 steps. Bytes on the link are what the kernel counted on rank 0's
network card, the dense all-reduce included; times are medians of periods of averaging.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from many_hosts import FREE_MBIT, card_bytes, set_rate, start

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
#: Steps between averages, and before the clock starts: one period.
PERIOD = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=2)
    parser.add_argument("--mbit", type=float, nargs="+", default=[1000, 200])
    parser.add_argument("--periods", type=int, default=3, help=f"of {PERIOD} steps, timed")
    parser.add_argument("--batch", type=int, default=1024, help="samples per rank")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--max-rows", type=int, default=200_000)
    parser.add_argument("--folder", help="set by this program for the ranks")
    options = parser.parse_args()
    options.mbit = [FREE_MBIT, *options.mbit]
    if options.folder:
        run_rank(options)
        return 0
    return start(options, HERE)


def run_rank(options: argparse.Namespace) -> None:
    import torch
    from benchlib import emit
    from dlrm_data import DlrmConfig

    from shardlab import comm

    torch.set_num_threads(1)
    groups = comm.init()
    config = DlrmConfig(dim=options.dim, rank_batch=options.batch, world=groups.world_size,
                        max_rows=options.max_rows)
    count, size = options.hosts, options.ranks_per_host
    layouts = {f"1 x {count * size}": (1, 1), f"{count} x {size}, every step": (count, 1),
               f"{count} x {size}, every {PERIOD} steps": (count, PERIOD)}
    runs = {name: Run(config, groups, *layout) for name, layout in layouts.items()}
    for rate in options.mbit:
        set_rate(options, groups, rate)
        for run in runs.values():
            run.train()
        found: dict[str, list[dict]] = {name: [] for name in runs}
        for _ in range(options.periods):
            for name, run in runs.items():
                found[name].append(run())
        if groups.rank == 0:
            for name, figures in found.items():
                times = [each["step_ms"] for each in figures]
                emit(layout=name, mbit_per_s=None if rate == FREE_MBIT else rate,
                     **{**figures[-1], "step_ms": statistics.median(times),
                        "least_step_ms": min(times)})
    comm.barrier(groups)
    comm.shutdown()


class Run:
    """Row-wise tables in so many groups."""

    def __init__(self, config, groups, replicas: int, sync: int) -> None:
        import torch
        from dlrm_data import rank_batch
        from dlrm_shardlab import make_batch, make_plan

        import shardlab as sl

        torch.manual_seed(config.seed)
        tables = [sl.EmbeddingBagConfig(rows, config.dim, f"t{i}", (f"f{i}",))
                  for i, rows in enumerate(config.rows)]
        dlrm = sl.models.DLRM(sl.EmbeddingBagCollection(tables), config.dense_features,
                              config.bottom, config.top[:-1])
        group = replace(groups, world_size=groups.world_size // replicas)
        self.model, self.optimizer = sl.shard(
            dlrm, make_plan(tables, "row_wise", group).with_replicas(replicas, sync),
            groups=groups, seed=config.seed,
            optimizer=sl.optim.RowWiseAdagrad(lr=config.learning_rate),
            dense_optimizer=lambda p: torch.optim.SGD(p, lr=config.learning_rate))
        self.groups = groups
        self._batches = [make_batch(*rank_batch(config, step, groups.rank))
                         for step in range(PERIOD)]

    def __call__(self) -> dict[str, object]:
        """Means of a step; what was sent is summed over all ranks, of the link over one host."""
        import torch

        from shardlab import comm

        wire = next(iter(self.model.collections().values())).wire
        comm.barrier(self.groups)
        before = torch.tensor([wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes,
                               wire.sync_bytes], dtype=torch.float64)
        link, mark = card_bytes(), time.perf_counter()
        self.train()
        comm.barrier(self.groups)
        step_ms = 1e3 * (time.perf_counter() - mark) / PERIOD
        link = card_bytes() - link
        sent = comm.all_reduce_(torch.tensor(
            [wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes, wire.sync_bytes],
            dtype=torch.float64) - before, self.groups) / PERIOD / 1e6
        names = ("ids", "rows", "gradients", "sync")
        return {"step_ms": step_ms, "link_mb_per_host": link / PERIOD / 1e6,
                "sent_mb": dict(zip(names, sent.tolist()))}

    def train(self) -> None:
        """A period of steps."""
        import torch

        loss_of = torch.nn.BCEWithLogitsLoss()
        for dense, features, labels in self._batches:
            self.optimizer.zero_grad()
            loss_of(self.model(dense, features), labels).backward()
            self.optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
