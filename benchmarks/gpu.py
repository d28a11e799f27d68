"""Row ops on a CUDA device: Triton faces equal to the reference, then their bandwidth.

    python benchmarks/gpu.py [--rows 500000] [--batch 16384] [--samples 20]

One JSON object per shape and op: median milliseconds of a call (launches and host work included),
payload gigabytes per second, and the fraction of what a device copy reaches. Bytes are counted
once per id, as if nothing were cached: hot rows come from the L2, so a fraction may exceed 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.rows import gather_rows, pool_rows, sum_rows, update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Segments, Uniques, unique_segments

#: Bytes of the copy that sets the limit: far beyond any L2.
COPY_BYTES = 1 << 30
#: Calls between two events, so that the host works ahead of the device.
CALLS = 5
#: Largest difference of a sum or step, relative to the largest element: other order of summation.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    """A batch: ``tables`` features of ``batch`` bags with ``pooling`` ids each."""

    tables: int
    dim: int
    pooling: int
    rows: int
    batch: int


#: (tables, dim, pooling): Criteo's features at three widths, and long bags.
SHAPES = ((26, 16, 1), (26, 64, 1), (26, 128, 1), (8, 64, 20))


class Problem:
    """Tables with row-wise Adagrad state in one arena, zipf-like ids, their pooled gradients."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        tables, dim, rows, bags = shape.tables, shape.dim, shape.rows, shape.batch
        block_bytes = 4 * rows * (dim + 1)
        blocks = [(t * block_bytes, 4 * dim, t * block_bytes + 4 * rows * dim, 4, dim, rows)
                  for t in range(tables)]
        count, width = bags * shape.pooling, tables * dim
        unit = torch.rand(tables * count, generator=generator, device=device, dtype=torch.float64)
        self.shape, self.blocks = shape, Blocks(torch.tensor(blocks))
        self.elements = torch.rand(tables * block_bytes // 4, generator=generator, device=device)
        self.ids = (float(rows) ** unit).long().sub_(1).clamp_(0, rows - 1)
        self.uniques = self._find_uniques(count, width)
        self.grads = torch.randn(bags * width, generator=generator, device=device)
        self.jobs = torch.tensor([(start // 4, dim, dim, bags, t * count, 0, shape.pooling, 0,
                                   t * dim, width, 0) for t, (start, *_) in enumerate(blocks)])
        splits = self.uniques.splits
        starts, counts = splits[:-1], splits.diff()
        number = torch.arange(tables)
        self.segments = torch.stack([number, starts, counts, starts * dim], 1)
        self.pieces = torch.stack([starts, counts, torch.full_like(number, dim), 0 * number,
                                   starts * dim, torch.full_like(number, dim)], 1)

    def _find_uniques(self, count: int, width: int) -> Uniques:
        tables, dim = self.shape.tables, self.shape.dim
        chunks = torch.tensor([(t, t * count, count, t * dim, width) for t in range(tables)])
        bag = torch.arange(count, device=self.ids.device) // self.shape.pooling
        limits = torch.full((tables,), self.shape.rows)
        return unique_segments(self.ids, chunks, Segments(limits, torch.zeros_like(limits)),
                               bag.repeat(tables))

    def ops(self) -> dict[str, tuple[Callable[[], None], Tensor, int]]:
        """op -> (a call, the tensor that it writes, payload bytes that it moves)."""
        uniques, dim = self.uniques, self.shape.dim
        row, found, entries = 4 * dim, uniques.ids.numel(), self.ids.numel()
        arena, step = self.elements.view(torch.uint8), StepParameters("row_wise_adagrad", 0.01, 1.0)
        rows = torch.zeros(found * dim, device=self.ids.device)
        pooled = torch.zeros_like(self.grads)
        index = 8  # bytes of an id, an offset or an edge
        return {
            "gather_rows": (
                lambda: gather_rows(arena, self.blocks, self.segments, uniques.ids, rows), rows,
                found * (2 * row + index)),
            "pool_rows": (
                lambda: pool_rows(self.elements, self.jobs, self.ids, None, None, pooled), pooled,
                entries * (row + index) + pooled.numel() * 4),
            "sum_rows": (
                lambda: sum_rows(self.grads, uniques, None, self.pieces, 1.0, rows), rows,
                entries * (row + index) + found * (row + index)),
            "update_rows": (
                lambda: update_rows(arena, self.blocks, uniques, None, self.grads, step),
                self.elements,
                entries * (row + index) + found * (2 * (row + 4) + 2 * index)),
        }


@contextmanager
def face(name: str) -> Iterator[None]:
    """Forces a face of every op."""
    before = os.environ.get("SHARDLAB_FACE")
    os.environ["SHARDLAB_FACE"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["SHARDLAB_FACE"]
        else:
            os.environ["SHARDLAB_FACE"] = before


def check(problem: Problem) -> None:
    """Runs every op with both faces from the same state.

    Raises:
        AssertionError: they differ by more than the order of summation explains.
    """
    for op, (call, output, _) in problem.ops().items():
        before = output.clone()
        with face("reference"):
            call()
        expected = output.clone()
        output.copy_(before)
        with face("triton"):
            call()
        difference = (output - expected).abs_().max() / expected.abs().max()
        output.copy_(before)
        assert difference <= TOLERANCE, f"{op} {problem.shape}: faces differ by {difference:.2e}"


def milliseconds(call: Callable[[], None], samples: int) -> float:
    """Median device time of a call."""
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def copy_bytes_per_s(samples: int) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.rand(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / milliseconds(lambda: target.copy_(source), samples) * 1e3


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000,
                        help="rows of every table; the check holds five copies of all")
    parser.add_argument("--batch", type=int, default=16_384, help="bags of every feature")
    parser.add_argument("--samples", type=int, default=20, help="timings of which the median")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"benchmarks/gpu.py needs a CUDA device; torch {torch.__version__} finds none here",
              file=sys.stderr)
        return 2
    limit = copy_bytes_per_s(options.samples)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                      "copy_gb_per_s": round(limit / 1e9, 1)}), flush=True)
    for tables, dim, pooling in SHAPES:
        shape = Shape(tables, dim, pooling, options.rows, options.batch)
        problem = Problem(shape, "cuda")
        check(problem)
        for op, (call, _, moved) in problem.ops().items():
            with face("triton"):
                ms = milliseconds(call, options.samples)
            rate = moved / ms * 1e3
            print(json.dumps({"op": op, **vars(shape), "uniques": problem.uniques.ids.numel(),
                              "ms": round(ms, 4), "gb_per_s": round(rate / 1e9, 1),
                              "of_copy": round(rate / limit, 3)}), flush=True)
        del problem
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
