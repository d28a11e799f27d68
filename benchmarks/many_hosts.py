"""DLRM over slow links: samples/s with and without looking ahead, TorchRec beside it.

    sudo python benchmarks/many_hosts.py [--hosts 2] [--ranks-per-host 1] [--mbit 1000 200]
    sudo python benchmarks/many_hosts.py --ranks-per-host 2 --hierarchy both --no-torchrec

    sudo python benchmarks/many_hosts.py --wire fp32 fp16 int8 --dense-wire fp32 fp16 int8

Hosts are network namespaces of this machine (tests/hosts.py). All modes run in turns in one job, on
the same batches. A free link comes first: its time is what cannot be hidden behind anything, the
compute. On a slow link, `hidden` is how much of min(compute, exchange) looking ahead saved:

    hidden = (T_plain - T_ahead) / min(C, T_plain - C),   C = T_plain on the free link

`overlapped` is how much of it everything together hides, the dense all-reduce behind the backward,
too, by what the link must carry:

    overlapped = (C + X - T) / min(C, X),   X = bytes that leave a host / rate

With `--hierarchy both` every mode runs flat and in two stages; `two_stage` is how many times faster
that is. Rounds of all modes follow each other, and the median of all rounds' steps counts, so that
what else the machine does hits all of them. `--sleep-ms 80` replaces our layers by sleeping
(slept_layers.py): links and waits then show on a busy machine, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
#: Mode: (depth, staleness) of ours, or TorchRec's pipeline.
MODES = {"plain": (0, 0), "ahead": (1, 0), "stale": (1, 1)}
STAGED = " two_stage"
#: Of a step, over all ranks: ids, rows and gradients inside hosts and across them, and what really
#: left the hosts, with dense gradients and headers of packets.
SENT = ("inside", "across", "on_links")
CARD = "eth0"
TORCHREC = {"torchrec": "none", "torchrec sparse_dist": "sparse_dist"}
FREE_MBIT = 40_000
WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--mbit", type=float, nargs="+", default=[1000, 200])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1024, help="samples per rank")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--max-rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=1, help="of all modes, of --steps each")
    parser.add_argument("--wire", nargs="+", default=["fp32"],
                        help="codecs of rows and gradients, ours; each is a run of its own")
    parser.add_argument("--dense-wire", nargs="+",
                        help="codecs of dense gradients, one for each of --wire; absent: fp32")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--hierarchy", choices=["flat", "two_stage", "both"], default="flat")
    parser.add_argument("--sleep-ms", type=float, default=0,
                        help="ours: layers sleep so long a step instead of multiplying")
    parser.add_argument("--no-torchrec", action="store_true")
    parser.add_argument("--folder", help="set by this program for the ranks")
    options = parser.parse_args()
    options.mbit = [FREE_MBIT, *options.mbit]
    options.dense_wire = options.dense_wire or ["fp32"] * len(options.wire)
    if len(options.dense_wire) != len(options.wire):
        parser.error(f"--dense-wire: {len(options.dense_wire)} codecs for {len(options.wire)} of "
                     "--wire")
    if options.folder:
        run_rank(options)
        return 0
    return start(options, HERE)


def start(options: argparse.Namespace, program: Path) -> int:
    """Builds hosts, runs the program on them, and changes the links' rate when the ranks ask."""
    from tests.hosts import Hosts, refusal

    reason = refusal()
    if reason:
        print(f"no hosts: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, Hosts(options.hosts, FREE_MBIT) as hosts:
        processes = hosts.start_torchrun([str(program), *sys.argv[1:], "--folder", folder],
                                         options.ranks_per_host)
        for line in processes[0].stdout or ():
            if line.startswith("rate "):
                rate = line.split()[1]
                hosts.set_rate(float(rate))
                Path(folder, f"rate-{rate}").touch()
            else:
                print(line, end="", flush=True)
        return max(process.wait() for process in processes)


def run_rank(options: argparse.Namespace) -> None:
    import torch
    from benchlib import emit
    from dlrm_data import DlrmConfig

    from shardlab import comm

    torch.set_num_threads(1)
    groups = comm.init()
    config = DlrmConfig(dim=options.dim, rank_batch=options.batch, world=groups.world_size,
                        max_rows=options.max_rows)
    runs = build_runs(options, config, groups)
    compute: dict[str, float] = {}
    for rate in options.mbit:
        set_rate(options, groups, rate)
        steps: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                steps[name] += run(options.steps)
        seconds = {name: statistics.median(taken) for name, taken in steps.items()}
        if rate == FREE_MBIT:
            compute = seconds
        sent = {name: summed(run.sent, groups) for name, run in runs.items()}
        if groups.rank == 0:
            emit(hosts=options.hosts, ranks=groups.world_size, mbit_per_s=rate,
                 step_ms={name: 1e3 * taken for name, taken in seconds.items()},
                 samples_per_s={name: config.global_batch / taken
                                for name, taken in seconds.items()},
                 hidden=hidden(seconds, compute) if rate != FREE_MBIT else None,
                 overlapped=overlapped(seconds, compute, sent, (rate, options.hosts))
                 if rate != FREE_MBIT and "plain" in options.modes else None,
                 two_stage={name: taken / seconds[staged] for name, taken in seconds.items()
                            if (staged := in_stages(name)) in seconds},
                 over_first_wire={name: seconds[name.rsplit(f" {wire}", 1)[0]] / taken
                                  for name, taken in seconds.items()
                                  for wire in wire_names(options)[1:]
                                  if name.endswith(f" {wire}")},
                 mb_per_step={name: dict(zip(SENT, (part / 1e6 for part in parts), strict=True))
                              for name, parts in sent.items()})
    comm.shutdown()
    sys.stdout.flush()
    os._exit(0)  # TorchRec's pipeline threads would wait for each other


def in_stages(name: str) -> str:
    """The same mode and codec in two stages."""
    mode, _, wire = name.partition(" ")
    return f"{mode}{STAGED}{' ' * bool(wire)}{wire}"


def hidden(seconds: dict[str, float], compute: dict[str, float]) -> dict[str, float]:
    """By mode that looks ahead, how much of min(compute, exchange) it saved."""
    found = {}
    for name in seconds:
        plain = name.replace("ahead", "plain").replace("stale", "plain")
        if plain != name and plain in seconds and name.split()[0] in MODES:
            can = min(compute[plain], seconds[plain] - compute[plain])
            found[name] = (seconds[plain] - seconds[name]) / can
    return found


def overlapped(seconds: dict[str, float], compute: dict[str, float],
               sent: dict[str, list[float]], link: tuple[float, int]) -> dict[str, float]:
    """By mode of ours, how much of min(compute, bytes / rate) is hidden; ``link``: rate, hosts."""
    found = {}
    for name, taken in seconds.items():
        if name.split()[0] in MODES:
            alone = compute[name.replace("ahead", "plain").replace("stale", "plain")]
            bits = 8 * sent[name][SENT.index("on_links")] / link[1]
            carried = bits / (1e6 * link[0])
            found[name] = (alone + carried - taken) / min(alone, carried)
    return found


def summed(sent: tuple[float, ...], groups) -> list[float]:
    """What ranks have sent, of all of them; a host's card counts for each of its ranks alike."""
    import torch

    from shardlab import comm

    card = sent[2] / groups.local_world_size
    found = torch.tensor([*sent[:2], card], dtype=torch.float64)
    return comm.all_reduce_(found, groups).tolist()


def card_bytes() -> int:
    """What this host has sent over its card, everything included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == CARD:
            return int(numbers.split()[8])
    return 0


def set_rate(options: argparse.Namespace, groups, rate: float) -> None:
    """Asks the parent for a rate of all links, and waits until it is set."""
    from shardlab import comm

    comm.barrier(groups)
    if groups.rank == 0:
        print(f"rate {rate}", flush=True)
    while not Path(options.folder, f"rate-{rate}").exists():
        time.sleep(0.05)
    comm.barrier(groups)


def wire_names(options: argparse.Namespace) -> list[str]:
    """Names of the codecs: that of rows, and of dense gradients where these have one."""
    return [wire if dense == "fp32" else f"{wire}/{dense}"
            for wire, dense in zip(options.wire, options.dense_wire, strict=True)]


def build_runs(options: argparse.Namespace, config, groups) -> dict:
    """Mode -> run(steps) -> median seconds of a step."""
    from torchrec_dlrm import build_torchrec, torchrec_batch

    from shardlab import comm

    kinds = {} if options.hierarchy == "two_stage" else {"": groups}
    if options.hierarchy != "flat":
        kinds[STAGED] = comm.with_stages(groups)
    wires = [((wire, dense), f" {name}" if number else "") for number, (wire, dense, name)
             in enumerate(zip(options.wire, options.dense_wire, wire_names(options), strict=True))]
    runs: dict = {name + kind + suffix: Ours(config, ranks, MODES[name], wire, options)
                  for name in options.modes for kind, ranks in kinds.items()
                  for wire, suffix in wires}
    if not options.no_torchrec:
        case = {"framework": "torchrec", "sharding": "row_wise", "qcomm": "fp32", "dim": config.dim,
                "optimizer": "rowwise_adagrad", "weights": "fp32", "plan": "manual",
                "dense_dtype": "fp32"}
        batches = [torchrec_batch(config, step, groups.rank)
                   for step in range(options.steps + WARM_UP)]
        for name, pipeline in TORCHREC.items():
            step = build_torchrec({**case, "pipeline": pipeline}, config, groups.rank)
            runs[name] = Theirs(step, batches, pipeline != "none")
    return runs


class Ours:
    """Row-wise tables under one depth and staleness, and codecs of rows and dense gradients."""

    def __init__(self, config, groups, mode: tuple[int, int], wire: tuple[str, str],
                 options: argparse.Namespace) -> None:
        import torch
        from dlrm_data import rank_batch
        from dlrm_shardlab import make_batch, make_plan
        from slept_layers import SleptDLRM

        import shardlab as sl
        from shardlab.table_plan import WireDtypes

        torch.manual_seed(config.seed)
        tables = [sl.EmbeddingBagConfig(rows, config.dim, f"t{i}", (f"f{i}",))
                  for i, rows in enumerate(config.rows)]
        ebc = sl.EmbeddingBagCollection(tables)
        dlrm = SleptDLRM(ebc, config, options.sleep_ms) if options.sleep_ms else \
            sl.models.DLRM(ebc, config.dense_features, config.bottom, config.top[:-1])
        self.model, self.optimizer = sl.shard(
            dlrm, make_plan(tables, "row_wise", groups).with_wire(
                WireDtypes(wire[0], wire[0])).with_dense_wire(wire[1]),
            groups=groups, seed=config.seed,
            optimizer=sl.optim.RowWiseAdagrad(lr=config.learning_rate),
            dense_optimizer=lambda p: torch.optim.SGD(p, lr=config.learning_rate))
        self.depth, self.staleness = mode
        self.sent = (0.0, 0.0, 0.0)
        self._batches = [make_batch(*rank_batch(config, step, groups.rank))
                         for step in range(options.steps + WARM_UP)]

    def __call__(self, steps: int) -> list[float]:
        import torch

        import shardlab as sl

        loss_of, taken = torch.nn.BCEWithLogitsLoss(), []
        wire = next(iter(self.model.collections().values())).wire
        inside, across, card = wire.inside_bytes, wire.across_bytes, card_bytes()
        mark = time.perf_counter()
        for dense, features, labels in sl.prefetching(
                iter(self._batches), self.model, lambda batch: batch[1], depth=self.depth,
                staleness=self.staleness):
            self.optimizer.zero_grad()
            loss_of(self.model(dense, features), labels).backward()
            self.optimizer.step()
            now = time.perf_counter()
            taken.append(now - mark)
            mark = now
        self.sent = ((wire.inside_bytes - inside) / len(taken),
                     (wire.across_bytes - across) / len(taken),
                     (card_bytes() - card) / len(taken))
        return taken[WARM_UP:]


class Theirs:
    """A step of TorchRec, or its pipeline."""

    def __init__(self, step, batches, pipelined: bool) -> None:
        self._step, self._batches, self._pipelined = step, batches, pipelined
        self.sent = (0.0, 0.0, 0.0)

    def __call__(self, steps: int) -> list[float]:
        taken, card = [], card_bytes()
        iterator = iter(self._batches)
        for batch in self._batches[:steps + WARM_UP]:
            start = time.perf_counter()
            try:
                self._step(iterator if self._pipelined else batch)
            except StopIteration:
                break
            taken.append(time.perf_counter() - start)
        self.sent = (0.0, 0.0, (card_bytes() - card) / len(taken))
        return taken[WARM_UP:]


if __name__ == "__main__":
    sys.exit(main())
