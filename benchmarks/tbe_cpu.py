"""Embedding-bag train step on CPU: lookup forward, then backward with the optimizer update.

    python tbe_cpu.py --rounds 2 --limits results/limits.jsonl > results/tbe.jsonl
    python tbe_cpu.py --cases c --frameworks fbgemm --optimizers sgd --dtypes fp32

Each (case, framework, dtype, optimizer) runs in a process of its own, so that the peak RSS is
its own; the rounds are interleaved. Every batch is fresh (the batches together touch more than
the last-level cache holds) and comes from a seed, so that all frameworks see the same ids.
To add a framework: subclass `tbe_cases.Step`, and name it in `tbe_peers.FRAMEWORKS`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from benchlib import (
    Noise,
    available_mib,
    distribution,
    emit,
    machine,
    peak_rss_mib,
    sample_ids,
    summarize,
    wait_quiet,
)
from tbe_cases import CASES, ELEMENT_BYTES, Case, Step
from tbe_peers import FRAMEWORKS


# ---------------------------------------------------------------- batches and limits
def make_batches(case: Case, dist: str, seed: int, total_ids: int) -> np.ndarray:
    """[batches, tables, batch * pooling] ids, the same for every framework."""
    count = max(8, min(400, total_ids // case.lookups))
    ids = np.empty((count, len(case.rows), case.batch * case.pooling), dtype=np.int64)
    rng = np.random.default_rng([seed, len(case.rows), case.dim])
    for table, rows in enumerate(case.rows):
        ids[:, table] = sample_ids(rows, ids[:, table].size, dist, rng).reshape(count, -1)
    return ids


class Limits:
    """Rows and bytes per second of random and of streamed memory, out of results/limits.jsonl."""

    def __init__(self, path: str | None):
        self.rates: dict[tuple[str, int, int], float] = {}
        self.streams: dict[tuple[str, int], float] = {}
        if not path or not os.path.exists(path):
            return
        for line in Path(path).read_text().splitlines():
            entry = json.loads(line)
            if entry.get("section") == "rows" and entry["case"] in ("gather_random", "rmw_random"):
                key = (entry["case"].split("_")[0], entry["row_bytes"], entry["threads"])
                self.rates[key] = max(self.rates.get(key, 0.0), entry["mrows_s"] * 1e6)
            if entry.get("section") == "mem":
                stream = (entry["case"], entry["threads"])
                self.streams[stream] = max(self.streams.get(stream, 0.0), entry["gbps"] * 1e9)

    def stream_seconds(self, case: str, size: float, threads: int) -> float:
        rate = self.streams.get((case, threads))
        return size / rate if rate else float("nan")

    def seconds(self, kind: str, rows: float, row_bytes: int, threads: int) -> float:
        size = min(512, max(64, 1 << (row_bytes - 1).bit_length()))
        rate = self.rates.get((kind, size, threads))
        return rows / rate * max(1.0, row_bytes / 512) if rate else float("nan")


def step_traffic(case: Case, dtype: str, optimizer: str, unique: float) -> dict:
    """Bytes a step must move: every looked-up row, and read + write of each unique row + state."""
    row = case.dim * ELEMENT_BYTES[dtype]
    state = {"sgd": 0, "rowwise_adagrad": 4, "adagrad": case.dim * 4,
             "adam": case.dim * 8}[optimizer]
    return {"row": row, "state": state, "forward": case.lookups * row,
            "update": unique * 2 * (row + state)}


# ---------------------------------------------------------------- worker
def run_worker(spec: dict) -> None:
    import torch

    if spec["framework"] == "shardlab":
        from tbe_shardlab import ShardLab, assert_equal_to_fbgemm

        FRAMEWORKS["shardlab"] = ShardLab
        assert_equal_to_fbgemm(spec["optimizer"])
    case = CASES[spec["case"]]
    limits = Limits(spec["limits"])
    step = FRAMEWORKS[spec["framework"]](case, spec["dtype"], spec["optimizer"])
    warm = step.prepare(make_batches(case, "uniform", spec["seed"] + 1, 0)[0])
    step.backward(step.forward(warm))
    step.touch_state()
    base = {k: spec[k] for k in ("framework", "case", "dtype", "optimizer", "round", "hugepages")}
    for dist in spec["dists"]:
        ids = make_batches(case, dist, spec["seed"], spec["total_ids"])
        starts = np.concatenate([[0], np.cumsum(case.rows)[:-1]])[:, None]
        unique = float(np.mean([np.unique(one + starts).size for one in ids[:4]]))
        batches = [step.prepare(one) for one in ids]
        for threads in spec["threads"]:
            torch.set_num_threads(threads)
            result = measure_quietly(step, batches, spec)
            emit(**base, dist=dist, threads=threads,
                 **derive(case, spec, unique, threads, limits, result))
        del batches, ids
    emit(**base, peak_rss_mib=peak_rss_mib())


def measure_quietly(step: Step, batches: list, spec: dict) -> dict:
    """Up to three tries for a measurement that others do not disturb; the quietest counts."""
    best = None
    for _ in range(3):
        wait_quiet(spec["wait"])
        result = measure(step, batches, spec["seconds"])
        if best is None or result["others"] < best["others"]:
            best = result
        if best["others"] <= 0.15:
            break
    return best


def measure(step: Step, batches: list, seconds: float) -> dict:
    forward, backward = [], []
    order = itertools.cycle(batches)
    for _ in range(3):
        step.backward(step.forward(next(order)))
    with Noise() as noise:
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or len(forward) < 5:
            batch = next(order)
            start = time.perf_counter()
            output = step.forward(batch)
            middle = time.perf_counter()
            step.backward(output)
            backward.append(time.perf_counter() - middle)
            forward.append(middle - start)
    both = summarize(f + b for f, b in zip(forward, backward))
    return {"forward": summarize(forward), "backward": summarize(backward), "step": both,
            "others": noise.others}


def derive(case: Case, spec: dict, unique: float, threads: int, limits: Limits,
           result: dict) -> dict:
    traffic = step_traffic(case, spec["dtype"], spec["optimizer"], unique)
    step_s, forward_s = result["step"]["median"], result["forward"]["median"]
    backward_s = result["backward"]["median"]
    # Floor: each unique row comes from memory once in the forward, and is updated once.
    floor_forward = limits.seconds("gather", unique, traffic["row"], threads)
    floor_backward = limits.seconds("rmw", unique, traffic["row"], threads)
    if traffic["state"]:
        floor_backward += limits.seconds("rmw", unique, traffic["state"], threads)
    # A step also writes the pooled output, and reads its gradient.
    output = len(case.rows) * case.batch * case.dim * 4
    floor_streams = (limits.stream_seconds("write_nontemporal", output, threads)
                     + limits.stream_seconds("read", output, threads))
    floor_step = floor_forward + floor_backward
    return {
        "forward_ms": forward_s * 1e3, "backward_update_ms": backward_s * 1e3,
        "step_ms": step_s * 1e3, "step_ms_min": result["step"]["min"] * 1e3,
        "mrows_s": case.lookups / step_s / 1e6, "unique_rows": unique,
        "lookups": case.lookups,
        "forward_gbps": traffic["forward"] / forward_s / 1e9,
        "step_gbps": (traffic["forward"] + traffic["update"]) / step_s / 1e9,
        "floor_forward_ms": floor_forward * 1e3, "floor_step_ms": floor_step * 1e3,
        "floor_streams_ms": floor_streams * 1e3,
        "fraction_of_limit_forward": floor_forward / forward_s,
        "fraction_of_limit_step": floor_step / step_s,
        "fraction_of_limit_with_output": (floor_step + floor_streams) / step_s,
        "steps": result["step"]["n"], "others": result["others"],
    }


# ---------------------------------------------------------------- orchestration
def needed_mib(case: Case, dtype: str, optimizer: str) -> float:
    traffic = step_traffic(case, dtype, optimizer, 0)
    return sum(case.rows) * (traffic["row"] + traffic["state"]) / 2**20 + 1500


def run_all(args) -> None:
    emit(section="machine", **machine(), mem_available_mib=available_mib())
    for turn in range(args.rounds):
        for case_name in args.cases:
            for framework in args.frameworks:
                dtypes, optimizers = columns_of(framework)
                for dtype, optimizer, huge in itertools.product(
                        dtypes, optimizers, args.hugepages):
                    if wanted(args, case_name, framework, dtype, optimizer):
                        run_one(args, turn, case_name, framework, dtype, optimizer, huge)


def columns_of(framework: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(dtypes, optimizers) of a framework; ShardLab's class is imported in its worker only."""
    if framework == "shardlab":
        return ("fp32",), ("sgd", "rowwise_adagrad", "adagrad", "adam")
    return FRAMEWORKS[framework].dtypes, FRAMEWORKS[framework].optimizers


def wanted(args, case_name, framework, dtype, optimizer) -> bool:
    if framework == "torch_merged" and len(CASES[case_name].rows) == 1:
        return False  # the same as torch_loop
    if dtype == "fp16_sr" and optimizer != "sgd":
        return False  # the flag changes nothing on CPU ; one optimizer shows it
    return dtype in args.dtypes and optimizer in args.optimizers


def run_one(args, turn, case_name, framework, dtype, optimizer, huge) -> None:
    spec = {"framework": framework, "case": case_name, "dtype": dtype, "optimizer": optimizer,
            "round": turn, "hugepages": huge, "limits": args.limits, "seed": args.seed,
            "total_ids": args.total_ids, "dists": args.dists, "threads": args.threads,
            "seconds": args.seconds, "wait": args.wait}
    needed = needed_mib(CASES[case_name], dtype, optimizer)
    if needed > available_mib() - 1024:
        emit(**{k: spec[k] for k in ("framework", "case", "dtype", "optimizer", "round")},
             error=f"skipped: needs {needed:.0f} MiB, {available_mib()} MiB available")
        return
    env = dict(os.environ, THP_MEM_ALLOC_ENABLE=str(huge))
    done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(spec)], env=env,
                          capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            print(line, flush=True)
    if done.returncode:
        tail = [x for x in done.stderr.strip().splitlines() if x.strip()] or ["?"]
        emit(**{k: spec[k] for k in ("framework", "case", "dtype", "optimizer", "round")},
             error=tail[-1][:400], exit_code=done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    known = ["shardlab", *FRAMEWORKS]
    parser.add_argument("--frameworks", nargs="+", default=known, choices=known)
    parser.add_argument("--dtypes", nargs="+", default=list(ELEMENT_BYTES))
    parser.add_argument("--optimizers", nargs="+",
                        default=["sgd", "rowwise_adagrad", "adagrad", "adam"])
    parser.add_argument("--dists", nargs="+", type=distribution, default=["zipf:1.05", "uniform"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--hugepages", type=int, nargs="+", default=[0], choices=[0, 1],
                        help="1: torch allocates with THP_MEM_ALLOC_ENABLE=1")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--total-ids", type=int, default=12_000_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--wait", type=float, default=20.0)
    parser.add_argument("--limits", default=str(Path(__file__).parent / "results/limits.jsonl"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(json.loads(args.worker))
    else:
        args.limits = os.path.abspath(args.limits)
        run_all(args)


if __name__ == "__main__":
    main()
