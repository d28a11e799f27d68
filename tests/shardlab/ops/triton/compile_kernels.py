"""Compiles the row kernels for a GPU that need not be there, and prints what came out as JSON.

    python -m tests.shardlab.ops.triton.compile_kernels

The faces run on CPU tensors, but every launch is turned into Triton's warm-up, which compiles the
kernel for these very arguments down to machine code and launches nothing.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.triton import rows as kernels
from tests.shardlab.ops.cases import make_problem

COMPUTE_CAPABILITY, WARP_SIZE = 90, 32


class AbsentGpu:
    """What Triton asks its driver for when it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", COMPUTE_CAPABILITY, WARP_SIZE)


def launch_all() -> None:
    """Every kernel with chunks and weights, at a width that allows 16-byte loads."""
    problem = make_problem((16, 4), kind="adam", rows=7, entries=700, weighted=True)
    arena, blocks, ids = problem.arena, problem.blocks, problem.ids
    out = torch.empty(700 * 16)
    kernels.gather_rows(arena, blocks, torch.tensor([(0, 0, 700, 0), (1, 700, 10, 0)]), ids, out)
    job = torch.tensor([(0, 16, 16, 4, 0, 0, -1, 1, 0, 16, 1)])
    kernels.pool_rows(out, job, ids, torch.tensor([0, 1, 5, 5, 9]), problem.entry_weights, out)
    kernels.sum_rows(problem.grads, problem.uniques, problem.entry_weights,
                     torch.tensor([(0, 7, 16, 0, 0, 16)]), 0.5, out)
    for kind in ("sgd", "adagrad", "row_wise_adagrad", "adam", "row_wise_adam"):
        kernels.update_rows(arena, blocks, problem.uniques, None, problem.grads,
                            StepParameters(kind, 0.1))


def main() -> None:
    driver.set_active(AbsentGpu())
    found: list[dict[str, Any]] = []
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        found.append({"kernel": self.__name__, "machine_code_bytes": len(kernel.asm["cubin"]),
                      "fused": ptx.count("fma.rn.f32"), "approximate": ptx.count(".approx"),
                      "wide_loads": ptx.count(".v4.b32 {")})

    JITFunction.run = warm_up
    launch_all()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
