"""How often caches hit, beside exact LRU and LFU, and how fast they place rows.

    python cache_hits.py [--criteo criteo_kaggle_123k.parquet] [--sections hits,speed] > out.jsonl

Every batch's unique ids are placed in one call, as a training step does; rates are over the second
half of the batches. Exact LRU evicts the row of the whole level that was used longest ago. Exact
LFU counts the uses of every row of the table, resident or not, and keeps those with most; it is
what a cache with 3 bytes a slot cannot do, and an aim, not a peer. Criteo's tables have the ids of
the sample as rows, in random order: a share of the full cardinalities would hold all of it.
"""

from __future__ import annotations

import argparse
import heapq
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow.parquet as pq
import torch
from benchlib import Noise, emit, machine, zipf_ranks

from shardlab.cache_layout import cache_layout
from shardlab.ops.cache import build_cache_index, cache_lookup, cache_place
from shardlab.ops.cache_index import CacheBlock
from shardlab.tiers.memory import allocate

FRACTIONS = (0.01, 0.05, 0.2)
WAYS = (1, 4, 8, 16, 21, 32, 64)
POLICIES = (("lru", "always"), ("lfu", "always"), ("lfu", "frequency"))
CRITEO_COLUMNS = ("C3", "C12", "C16", "C21", "C4", "C24")
ZIPF_ROWS, ZIPF_IDS, ZIPF_BATCH, CRITEO_BATCH = 300_000, 4_000_000, 8_192, 2_048
SPEED_IDS, SPEED_REPS = 1_000_000, 15

Batches = list[np.ndarray]


# ---------------------------------------------------------------- ids
def split(ids: np.ndarray, batch: int) -> Batches:
    """The unique ids of every whole batch."""
    return [np.unique(ids[i:i + batch]) for i in range(0, len(ids) - batch + 1, batch)]


def zipf_batches(drift: bool) -> tuple[int, Batches]:
    """Zipf(1.05) over rows in random order; with drift, half the rows change rank midway."""
    rng = np.random.default_rng(0)
    names = rng.permutation(ZIPF_ROWS)
    ids = names[zipf_ranks(ZIPF_ROWS, ZIPF_IDS, 1.05, rng)]
    if drift:
        moved = rng.permutation(ZIPF_ROWS)[:ZIPF_ROWS // 2]
        names[moved] = names[np.roll(moved, 1)]
        later = names[zipf_ranks(ZIPF_ROWS, ZIPF_IDS // 2, 1.05, rng)]
        ids = np.concatenate([ids[:ZIPF_IDS // 2], later])
    return ZIPF_ROWS, split(ids, ZIPF_BATCH)


def criteo_batches(path: str) -> dict[str, tuple[int, Batches]]:
    rng = np.random.default_rng(0)
    found = {}
    for name in CRITEO_COLUMNS:
        words = pq.read_table(path, columns=[name])[name].to_pylist()
        values, ids = np.unique([int(word, 16) if word else -1 for word in words],
                                return_inverse=True)
        found[name] = len(values), split(rng.permutation(len(values))[ids], CRITEO_BATCH)
    return found


# ---------------------------------------------------------------- rates
def rate(batches: Batches, step: Callable[[int, np.ndarray], int]) -> tuple[int, int]:
    """(hits, ids) of the second half of the batches."""
    hits = total = 0
    for number, ids in enumerate(batches):
        found = step(number, ids)
        if number >= len(batches) // 2:
            hits, total = hits + found, total + len(ids)
    return hits, total


def cached(rows: int, batches: Batches, block: CacheBlock) -> tuple[int, int]:
    index = build_cache_index([block])

    def step(number: int, ids: np.ndarray) -> int:
        segments = torch.tensor([[0, 0, len(ids)]])
        return int(cache_place(index, segments, torch.from_numpy(ids), number).counters[0, 0])

    return rate(batches, step)


def exact_lru(slots: int, batches: Batches) -> tuple[int, int]:
    held: OrderedDict[int, None] = OrderedDict()

    def step(_: int, ids: np.ndarray) -> int:
        missing = []
        for row in ids.tolist():
            if row in held:
                held.move_to_end(row)
            else:
                missing.append(row)
        for row in missing[:slots]:
            if len(held) == slots:
                held.popitem(last=False)
            held[row] = None
        return len(ids) - len(missing)

    return rate(batches, step)


def exact_lfu(rows: int, slots: int, batches: Batches) -> tuple[int, int]:
    counts = [0] * rows
    held: set[int] = set()
    weakest: list[tuple[int, int]] = []  # heap of (count when pushed, row)

    def step(_: int, ids: np.ndarray) -> int:
        missing = [row for row in ids.tolist() if row not in held]
        for row in ids.tolist():
            counts[row] += 1
        for row in missing:
            if len(held) == slots:
                while counts[weakest[0][1]] != weakest[0][0]:
                    stale = weakest[0][1]
                    heapq.heapreplace(weakest, (counts[stale], stale))
                if weakest[0][0] >= counts[row]:
                    continue
                held.remove(heapq.heappop(weakest)[1])
            held.add(row)
            heapq.heappush(weakest, (counts[row], row))
        return len(ids) - len(missing)

    return rate(batches, step)


def measure_hits(name: str, tables: list[tuple[int, Batches]]) -> None:
    """One line a cache: hits of all tables together, each with a cache of its own."""
    def report(fraction: float, cache: str, results: list[tuple[int, int]], **params) -> None:
        hits, total = (sum(column) for column in zip(*results, strict=True))
        emit(section="hits", ids=name, fraction=fraction, cache=cache, hit_rate=hits / total,
             **params)

    for fraction in FRACTIONS:
        slots = [cache_layout(rows, fraction, 64).slots for rows, _ in tables]
        report(fraction, "exact lru", [exact_lru(room, batches) for room, (_, batches)
                                       in zip(slots, tables, strict=True)])
        report(fraction, "exact lfu", [exact_lfu(rows, room, batches) for room, (rows, batches)
                                       in zip(slots, tables, strict=True)])
        for policy, admission in POLICIES:
            for ways in WAYS:
                blocks = [CacheBlock(rows, cache_layout(rows, fraction, ways), policy, admission)
                          for rows, _ in tables]
                report(fraction, f"{policy} {admission}",
                       [cached(rows, batches, block) for (rows, batches), block
                        in zip(tables, blocks, strict=True)], ways=ways)


# ---------------------------------------------------------------- speed
def own_seconds() -> float:
    """CPU time of this process: other load on the machine does not count, but slows memory."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def time_ids(batches: Iterable[torch.Tensor], run: Callable[[torch.Tensor], object]) -> dict:
    """CPU time per id: best and median batch."""
    samples = []
    with Noise() as noise:
        for ids in batches:
            start = own_seconds()
            run(ids)
            samples.append((own_seconds() - start) / len(ids) * 1e9)
    return {"best_ns": min(samples), "median_ns": sorted(samples)[len(samples) // 2],
            "others": noise.others}


def measure_speed(rows: int) -> None:
    """One thread: hits in a cache of all rows, ids in random order."""
    segments = torch.tensor([[0, 0, SPEED_IDS]])
    generator = torch.Generator().manual_seed(1)

    def draw() -> Iterable[torch.Tensor]:
        return (torch.randint(0, rows, (SPEED_IDS,), generator=generator)
                for _ in range(SPEED_REPS))

    for ways in (16, 21):
        for policy in ("lru", "lfu"):
            layout = cache_layout(rows, 1.0, ways)
            index = build_cache_index([CacheBlock(rows, layout, policy)],
                                      allocate(layout.metadata_bytes, torch.device("cpu")))
            start = time.perf_counter()
            for first in range(0, rows, SPEED_IDS):
                ids = torch.arange(first, min(rows, first + SPEED_IDS))
                cache_place(index, torch.tensor([[0, 0, len(ids)]]), ids, 0)
            emit(section="speed", call="fill", ways=ways, policy=policy,
                 median_ns=(time.perf_counter() - start) / rows * 1e9)
            runs = {
                "lookup": lambda ids, index=index: cache_lookup(index, segments, ids),
                "place": lambda ids, index=index: cache_place(index, segments, ids, 1),
                "mark dirty": lambda ids, index=index: cache_place(
                    index, segments, ids, 1, touch=False, write=True),
            }
            for call, run in runs.items():
                emit(section="speed", call=call, ways=ways, policy=policy, rows=rows,
                     index_mb=layout.metadata_bytes / 1e6, **time_ids(draw(), run))


def measure_steps() -> None:
    """One thread: batches of Zipf ids, unique and sorted, above a cache of 5 %."""
    rows, rng = 10_000_000, np.random.default_rng(0)
    batches = split(rng.permutation(rows)[zipf_ranks(rows, 8_000_000, 1.05, rng)], 200_000)
    for policy, admission in POLICIES:
        layout = cache_layout(rows, 0.05, 21)
        index = build_cache_index([CacheBlock(rows, layout, policy, admission)],
                                  allocate(layout.metadata_bytes, torch.device("cpu")))
        hits = []

        def step(ids: torch.Tensor, index=index, hits=hits) -> None:
            segments = torch.tensor([[0, 0, len(ids)]])
            found = cache_place(index, segments, ids, len(hits), write=True)
            hits.append(int(found.counters[0, 0]) / len(ids))

        warm = len(batches) // 2
        time_ids(map(torch.from_numpy, batches[:warm]), step)
        times = time_ids(map(torch.from_numpy, batches[warm:]), step)
        emit(section="speed", call="zipf step", ways=layout.ways, policy=f"{policy} {admission}",
             rows=rows, index_mb=layout.metadata_bytes / 1e6, ids=len(batches[-1]),
             hit_rate=hits[-1], **times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteo", help="Parquet file with columns C1..C26 of hex digits")
    parser.add_argument("--sections", default="hits,speed")
    parser.add_argument("--rows", type=int, default=64_000_000, help="of the speed section")
    arguments = parser.parse_args()
    emit(section="machine", **machine())
    if "hits" in arguments.sections:
        measure_hits("zipf 1.05", [zipf_batches(drift=False)])
        measure_hits("zipf 1.05, drifting", [zipf_batches(drift=True)])
        if arguments.criteo:
            measure_hits("criteo, 6 largest tables", [*criteo_batches(arguments.criteo).values()])
    if "speed" in arguments.sections:
        torch.set_num_threads(1)
        measure_steps()
        measure_speed(arguments.rows)


if __name__ == "__main__":
    main()
