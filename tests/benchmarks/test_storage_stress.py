"""A short random history of tiered chains; `benchmarks/storage_stress.py` runs long ones."""

from __future__ import annotations

import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.storage_stress import Stress


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32),
       names=st.lists(st.sampled_from(["read", "step", "step", "prefetch", "prefetch", "flush",
                                       "whole"]), max_size=50))
def test_every_read_is_what_plain_arrays_say(seed, names):
    with tempfile.TemporaryDirectory() as folder:
        stress = Stress(folder, seed)
        try:
            for name in names:
                getattr(stress, name)()
            stress.whole()
        finally:
            stress.storage.close()


def test_a_run_counts_its_operations(tmp_path):
    stress = Stress(str(tmp_path), 3)
    stress.run(150)
    assert sum(stress.counts.values()) == 150
    stress.storage.close()
