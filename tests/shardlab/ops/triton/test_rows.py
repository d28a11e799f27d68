"""The row kernels compile for a GPU; their results are tested in `tests/shardlab/ops`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardlab.ops.registry import has_triton


@pytest.mark.slow
@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_kernels_compile_to_exact_arithmetic(tmp_path):
    """A process of its own: this one may have Triton's interpreter on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.shardlab.ops.triton.compile_kernels"],
        check=True, capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).resolve().parents[4],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)})
    found = json.loads(done.stdout)
    assert [row["kernel"] for row in found] == [
        "_gather_kernel", "_pool_kernel", "_chunk_kernel", "_sum_kernel",
        *["_chunk_kernel", "_update_kernel"] * 5]
    for row in found:
        assert row["machine_code_bytes"] > 0
        # Products that are fused and roots that are estimated would differ from the other faces.
        assert row["fused"] == row["approximate"] == 0, row
        if row["kernel"] in ("_gather_kernel", "_pool_kernel"):
            assert row["wide_loads"] > 0, row
