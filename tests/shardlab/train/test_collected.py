"""Numbers collected over steps: copied, grown, and forgotten."""

from __future__ import annotations

import torch

from shardlab.train import collected
from shardlab.train.collected import Collected


def test_rows_come_back_in_order_and_are_copies(monkeypatch) -> None:
    monkeypatch.setattr(collected, "_FIRST_ROWS", 4)
    kept = Collected(2, torch.device("cpu"))
    assert kept.all().shape == (2, 0)
    parts = [torch.arange(n, dtype=torch.float64) + n for n in (3, 0, 1, 2, 40)]
    for part in parts:
        kept.add(part, -part)
        part += 100
    expected = torch.cat(parts).float() - 100
    assert torch.equal(kept.all(), torch.stack([expected, -expected]))
    kept.clear()
    assert kept.rows == 0
    kept.add(torch.ones(1), torch.zeros(1))
    assert kept.all().tolist() == [[1.0], [0.0]]


def test_single_numbers_are_rows() -> None:
    kept = Collected(1, torch.device("cpu"))
    for value in range(5000):
        kept.add(torch.tensor(float(value), requires_grad=True))
    assert torch.equal(kept.all()[0], torch.arange(5000.0))
