"""What the row ops give on a set of problems, as a file: run in a process of its own.

    SHARDLAB_ISA=avx2 python -m tests.shardlab.ops.all_outputs OUTPUT_FILE avx2
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from shardlab.ops.registry import native
from tests.shardlab.ops.cases import (
    DIMS,
    KINDS,
    Place,
    PoolOptions,
    make_problem,
    run_gather,
    run_pool,
    run_sum,
    run_update,
    step_of,
)


def all_outputs(place: Place) -> dict[str, Tensor]:
    """Every op once with all widths, and every rule of the update."""
    problem = make_problem(DIMS, entries=80, skew="zipf", weighted=True)
    options = PoolOptions(weighted=True, mean=True, add=True, dropped=True)
    outputs = {"gather": run_gather(problem, place), "pool": run_pool(problem, options, place),
               "sum": run_sum(problem, 0.5, place, halves=True)}
    for kind in KINDS:
        problem = make_problem(DIMS, kind=kind, entries=80, skew="zipf")
        outputs[kind] = run_update(problem, step_of(kind, clip_value=1.5), place)
    return outputs


def main(path: str, isa: str) -> None:
    module = native()
    assert module is not None
    assert module.isa() == isa, f"asked for {isa}, got {module.isa()}"
    torch.save(all_outputs(Place("native", "cpu")), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
