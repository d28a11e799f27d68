"""Asks the C library's allocator to keep what a training step frees.

A step frees and asks again for the same megabytes: activations, gradients, received rows. glibc
hands freed memory at the end of its heap, and every large block that it mapped on its own, back to
the kernel, which then clears and maps the pages again at the next step: 250 to 1400 page faults, 1
to 5 % of a DLRM step at batch 1024. Blocks of 32 MiB and more it maps whatever its threshold: 8,192
samples a rank of 26 tables of 64 columns have 54 MB of pooled rows, and their DLRM step takes 11 %
longer; one that does little else takes nearly three times as long. So nothing is mapped here. The
peak of the memory used is the same either way.

glibc also gives every thread a heap of its own, and none of them uses what is free in another: the
thread that writes a checkpoint took 25 MB that the step's heap had free. There is one heap here.
"""

from __future__ import annotations

import ctypes
import sys

# Numbers of glibc's <malloc.h>.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_ARENA_MAX = -8
#: Freed bytes that may lie at the end of the heap.
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Stops the process's heap from shrinking between steps, and from becoming several.

    Called by the trainer and the benchmarks, never at import: it changes the whole process.

    Returns:
        Whether the allocator took the settings; False where it is not glibc's.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT_BYTES), (_ARENA_MAX, 1))
    return all(mallopt(option, value) == 1 for option, value in settings)
