"""Optimisers without torch's compiler: the same steps, and the compiler stays out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from shardlab.launch.eager import eager

KINDS = [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW]


def _trained(kind):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
    return [p.tolist() for p in layer.parameters()], optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_steps_are_those_of_the_optimiser(kind):
    assert _trained(eager(kind)) == _trained(kind)
    assert eager(kind).__name__ == kind.__name__


def test_a_closure_gets_gradients_and_hooks_are_called():
    parameter, called = torch.nn.Parameter(torch.ones(2)), []
    optimizer = eager(torch.optim.SGD)([parameter], lr=0.5)
    optimizer.register_step_post_hook(lambda *_: called.append(True))

    def closure():
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = parameter.sum()
            loss.backward()
            return loss

    assert optimizer.step(closure).item() == 2
    assert parameter.tolist() == [0.5, 0.5]
    assert called == [True]


_JOB = """
import sys
from shardlab.config import load_job
from shardlab.launch.train import run_job
sets = ["train.max_steps=2", "tables.max_rows=100", f"train.run_dir={sys.argv[1]}",
        "data.train_rows=[0, 2000]", "data.validation_rows=[2000, 2500]"]
assert run_job(load_job(None, sets)) == 0
import torch
if not torch.cuda.is_available():
    assert "torch._dynamo" not in sys.modules, "a CPU rank loaded the compiler"
    assert "triton" not in sys.modules
    assert "pyarrow" not in sys.modules, "generated rows need no Parquet"
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(1)).item() == 2
"""


def test_a_job_leaves_the_compiler_out_and_can_still_compile(tmp_path):
    done = subprocess.run([sys.executable, "-c", _JOB, str(tmp_path / "run")], text=True,
                          capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
