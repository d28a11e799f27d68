"""Random rows are different ones, and the line through their times."""

from __future__ import annotations

import pytest
import torch

from shardlab.launch.probe import memory
from shardlab.launch.probe.memory import RowSpeed, fit_rows

CPU = torch.device("cpu")


def test_rows_do_not_come_again_before_a_cache_has_forgotten_them(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_FORGOTTEN_BYTES", 64 * 10 * 50)
    sets = list(memory._random_rows(10_000, 50, 64, CPU))
    assert len(sets) == 1 + 10
    for found in sets:
        ids = found.ids
        assert len(ids) == 50
        assert bool((ids[1:] > ids[:-1]).all())
        assert int(ids[0]) >= 0
        assert int(ids[-1]) < 10_000
    assert len({tuple(found.ids.tolist()) for found in sets}) > 9


def test_small_memories() -> None:
    found = memory.row_speed(CPU, 64, 4 * 64, 0.0)
    assert found.read_s > 0
    assert found.update_s > 0


@pytest.mark.parametrize(("fixed", "per_byte"), [(15e-9, 0.2e-9), (0.0, 0.3e-9), (40e-9, 0.0)])
def test_lines_are_found_again(fixed: float, per_byte: float) -> None:
    speeds = [RowSpeed(size, fixed + per_byte * size, 2 * (fixed + per_byte * (size + 4)))
              for size in memory.ROW_BYTES]
    found = fit_rows(speeds)
    for speed in speeds:
        assert 1 / found.rows_per_s + speed.row_bytes / found.row_bytes_per_s == pytest.approx(
            speed.read_s, rel=0.02)
    assert found.rewrite_factor == pytest.approx(2.0, rel=0.02)
    assert found.error < 0.02


def test_updates_are_no_faster_than_reads() -> None:
    speeds = [RowSpeed(size, 1e-8, 1e-9) for size in memory.ROW_BYTES]
    assert fit_rows(speeds).rewrite_factor == 1.0
