"""ShardLab's embedding train step and a peer's, taking turns in one process.

    python tbe_turns.py --optimizers rowwise_adagrad sgd > results/tbe_turns.jsonl

What neighbours do to a shared machine's memory lasts for seconds and moves a step by half:
processes one after the other (tbe_cpu.py) meet different neighbours, turns of a few steps the same
ones. The ratio is taken turn by turn: its median over all turns, and the tenths of turns at both
ends. Each (case, optimizer, peer) has a process of its own, which holds the tables twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
from benchlib import available_mib, distribution, emit, machine
from tbe_cases import CASES, Step
from tbe_cpu import make_batches, needed_mib
from tbe_peers import FRAMEWORKS

#: Steps of a turn, and those of them that only bring one's own tables back into the caches.
STEPS, UNTIMED = 12, 2
PEERS = {"rowwise_adagrad": ["fbgemm"], "sgd": ["fbgemm", "torch_merged"],
         "adagrad": ["fbgemm"], "adam": ["torch_loop", "torch_merged"]}


class Runner:
    """One framework, the batches as it takes them, and where it stands in them."""

    def __init__(self, step: Step, ids: np.ndarray) -> None:
        self.step, self.times = step, []
        self.batches = itertools.cycle([step.prepare(one) for one in ids])

    def turn(self) -> float:
        """Median seconds of a step."""
        times = []
        for _ in range(STEPS):
            batch = next(self.batches)
            start = time.perf_counter()
            self.step.backward(self.step.forward(batch))
            times.append(time.perf_counter() - start)
        self.times += times[UNTIMED:]
        return float(np.median(times[UNTIMED:]))


def take_turns(ours: Runner, peer: Runner, seconds: float) -> dict[str, Any]:
    """Who begins changes from turn to turn."""
    ratios = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(ratios) < 4:
        both = (ours, peer) if len(ratios) % 2 else (peer, ours)
        took = {one: one.turn() for one in both}
        ratios.append(took[peer] / took[ours])
    milliseconds = {f"{name}_{what}": float(np.quantile(one.times, q)) * 1e3
                    for name, one in (("shardlab", ours), ("peer", peer))
                    for what, q in (("ms", 0.5), ("ms_min", 0))}
    low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    return {**milliseconds, "times_faster": middle, "times_faster_p10": low,
            "times_faster_p90": high, "turns": len(ratios)}


def run_worker(spec: dict[str, Any]) -> None:
    import torch
    from tbe_shardlab import ShardLab, assert_equal_to_fbgemm

    case, optimizer = CASES[spec["case"]], spec["optimizer"]
    assert_equal_to_fbgemm(optimizer)
    both = ShardLab(case, "fp32", optimizer), FRAMEWORKS[spec["peer"]](case, "fp32", optimizer)
    for step in both:
        step.backward(step.forward(step.prepare(make_batches(case, "uniform", spec["seed"] + 1,
                                                             0)[0])))
        step.touch_state()
    for dist in spec["dists"]:
        ids = make_batches(case, dist, spec["seed"], spec["total_ids"])
        ours, peer = (Runner(step, ids) for step in both)
        for threads in spec["threads"]:
            torch.set_num_threads(threads)
            ours.times, peer.times = [], []
            emit(**{k: spec[k] for k in ("case", "optimizer", "peer")}, dist=dist,
                 threads=threads, **take_turns(ours, peer, spec["seconds"]))


def run_one(args: argparse.Namespace, case: str, optimizer: str, peer: str) -> None:
    spec = {"case": case, "optimizer": optimizer, "peer": peer, "seed": args.seed,
            "dists": args.dists, "threads": args.threads, "seconds": args.seconds,
            "total_ids": args.total_ids}
    needed = 2 * needed_mib(CASES[case], "fp32", optimizer)
    if needed > available_mib() - 1024:
        emit(case=case, optimizer=optimizer, peer=peer,
             error=f"skipped: needs {needed:.0f} MiB, {available_mib()} MiB available")
        return
    done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(spec)],
                          capture_output=True, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        emit(case=case, optimizer=optimizer, peer=peer, exit_code=done.returncode,
             error=(done.stderr.strip().splitlines() or ["?"])[-1][:400])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--optimizers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--dists", nargs="+", type=distribution, default=["zipf:1.05", "uniform"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=8.0, help="for a case, both together")
    parser.add_argument("--total-ids", type=int, default=3_000_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(json.loads(args.worker))
        return
    emit(section="machine", **machine())
    for optimizer, case in itertools.product(args.optimizers, args.cases):
        for peer in PEERS[optimizer]:
            if peer != "torch_merged" or len(CASES[case].rows) > 1:
                run_one(args, case, optimizer, peer)


if __name__ == "__main__":
    main()
