"""The learning-rate factor over the steps, and its life in a scheduler."""

from __future__ import annotations

import pytest
import torch

from shardlab.errors import ConfigError
from shardlab.train.schedule import LearningRateFactor, build_schedule


@pytest.mark.parametrize(("kind", "expected"), [
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("linear_warmup", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("linear_decay", [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]),
    ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]),
])
def test_factor_of_each_kind(kind: str, expected: list[float]) -> None:
    factor = LearningRateFactor(kind, warmup_steps=2, steps=4, final_factor=0.1)
    assert [factor(step) for step in range(6)] == pytest.approx(expected)


def optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.1, 1.0)]
    return torch.optim.SGD(groups, lr=1.0)


def test_schedule_scales_every_group_and_resumes() -> None:
    first = optimizer()
    schedule = build_schedule(first, "cosine", warmup_steps=3, steps=10, final_factor=0.2)
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in first.param_groups])
        first.step()
        schedule.step()
    second = optimizer()
    resumed = build_schedule(second, "cosine", warmup_steps=3, steps=10, final_factor=0.2)
    for _ in range(5):
        second.step()
        resumed.step()
    state = resumed.state_dict(), second.state_dict()
    third = optimizer()
    resumed = build_schedule(third, "cosine", warmup_steps=3, steps=10, final_factor=0.2)
    third.load_state_dict(state[1])
    resumed.load_state_dict(state[0])
    for step in range(5, 12):
        assert [group["lr"] for group in third.param_groups] == rates[step]
        third.step()
        resumed.step()
    assert rates[0] == pytest.approx([0.1 / 3, 1 / 3])
    assert rates[-1] == pytest.approx([0.02, 0.2])


def test_unknown_kind_and_missing_end_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown kind 'step'; known: constant, linear_warmup"):
        build_schedule(optimizer(), "step")
    with pytest.raises(ConfigError, match=r"cosine needs steps above warmup_steps \(5\), found 5"):
        build_schedule(optimizer(), "cosine", warmup_steps=5, steps=5)
    with pytest.raises(ConfigError, match=r"linear_decay needs steps .* found None"):
        build_schedule(optimizer(), "linear_decay")
