"""Keeps torch's compiler out of CPU ranks, which never compile.

torch.optim imports it to tell it not to look at optimisers: 75 MB of resident memory and 1.3 s of
CPU time a rank, 150 MB and 1.4 s where Triton is installed (torch 2.13).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

_COMPILER = "torch._dynamo"


def leave_compiler_out() -> None:
    """From now on, optimisers are made and read without the compiler.

    Does nothing with CUDA, whose ranks may compile, or where the compiler is loaded already. A
    model that calls torch.compile still gets it.
    """
    if torch.cuda.is_available() or _COMPILER in sys.modules:
        return
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(Optimizer, name).__wrapped__
        method.__dynamo_disable = method  # where torch keeps what the compiler made of it


def eager(kind: type[Optimizer]) -> type[Optimizer]:
    """The same optimiser, whose steps do not load the compiler."""
    if torch.cuda.is_available():
        return kind
    plain: Callable[..., Any] = kind.step.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def step(self: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, closure)

    return type(kind.__name__, (kind,), {"step": step, "__doc__": kind.__doc__})
