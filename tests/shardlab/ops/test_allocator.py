"""The allocator's settings, in a process of their own: they cannot be taken back."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy
from shardlab.ops.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [numpy.ones(int(sys.argv[1])) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(keep_freed_memory())
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize("numbers", [400_000, 5_000_000], ids=["3.2 MB", "40 MB"])
def test_freed_memory_is_used_again_without_page_faults(numbers: int) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(numbers)], capture_output=True,
                          text=True, check=True)
    took, count = done.stdout.split()
    assert took == "True"
    assert int(count) < 100  # 4 x 8 blocks of 780 pages would be 25,000; huge ones of 40 MB: 640


def test_other_systems_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardlab.ops import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False
