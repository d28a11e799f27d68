"""What every test gets: seeds, quiet ranks at the end, the GPU marker, the shared data folder."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

# Read when torch loads OpenMP. Threads that spin while they wait for work take a core from those
# that have some: tests run beside each other, on more threads than a small machine has cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tests start some hundred processes: they need not all compile what they import.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import hypothesis
import numpy as np
import pytest
import torch

from tests.harness import shutdown_ranks

sys.dont_write_bytecode = False
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when triton is first imported: its kernels then run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples follow from the test's source, and from constants of the modules that are loaded by then:
# a failure comes back when the same tests run again.
hypothesis.settings.register_profile(
    "shardlab", deadline=None, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large])
hypothesis.settings.load_profile("shardlab")


#: Files that take longest, most of it waiting: workers that take files in order begin with them,
#: and none is left with one at the end.
LONGEST = ("launch/test_slurm_cluster.py", "launch/test_train.py", "test_hosts.py",
           "shardlab/ops/test_encoded_rows.py", "launch/test_replicas.py", "test_examples.py",
           "shardlab/train/test_resume.py", "shardlab/storage/test_pruned.py",
           "shardlab/sharded/test_equality.py", "examples/test_jobs.py", "launch/test_local.py",
           "shardlab/ops/test_rows.py", "planner/test_plan.py",
           "shardlab/train/test_pruned_checkpoints.py", "shardlab/sharded/test_hot_rows.py",
           "shardlab/tiers/test_disk_stress.py", "shardlab/sharded/test_two_stage.py",
           "shardlab/ops/test_codecs.py", "shardlab/sharded/test_wire.py",
           "shardlab/sharded/test_replicas.py", "shardlab/sharded/test_determinism.py",
           "shardlab/sharded/test_urgent.py", "shardlab/tiers/test_record_log.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if HAS_GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_sessionfinish() -> None:
    shutdown_ranks()


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """This test's seed, from its name; pytest shows the line when the test fails."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    print(f"seed of {request.node.nodeid}: {value}")
    return value


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Runs the test with one torch thread and puts the former count back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real click data beside the checkout; tests that need it skip without it."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real click data: {folder} does not exist")
    return folder
