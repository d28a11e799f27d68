"""The allocator's settings, in a process of their own: they cannot be taken back."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy
from shardlab.ops.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [numpy.ones(400_000) for _ in range(8)]  # 3.2 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory())
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          check=True)
    took, count = done.stdout.split()
    assert took == "True"
    assert int(count) < 100  # 4 x 8 blocks of 780 pages would be 25,000


def test_other_systems_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardlab.ops import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False
