"""Learning-rate schedules: one factor on every parameter group, as a torch scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from shardlab.errors import ConfigError

KINDS = ("constant", "linear_warmup", "cosine", "linear_decay")
_DECAYING = ("cosine", "linear_decay")


@dataclass
class LearningRateFactor:
    """The factor at a step: a linear warm-up, then the shape of ``kind``.

    Attributes:
        kind: ``constant`` and ``linear_warmup`` stay at 1; ``cosine`` and ``linear_decay`` fall
            to ``final_factor`` at step ``steps`` and stay there.
        warmup_steps: the factor is (step + 1) / warmup_steps before this step.
        steps: step at which a falling factor reaches its end.
        final_factor: the end.
    """

    kind: str
    warmup_steps: int
    steps: int
    final_factor: float

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind not in _DECAYING:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        left = 1.0 - done if self.kind == "linear_decay" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final_factor + (1.0 - self.final_factor) * left


def build_schedule(optimizer: torch.optim.Optimizer, kind: str = "constant",
                   warmup_steps: int = 0, steps: int | None = None,
                   final_factor: float = 0.0) -> LambdaLR:
    """Builds the scheduler that `Trainer` steps once per training step.

    Args:
        optimizer: its groups' learning rates are what the factor multiplies.
        kind: one of `KINDS`.
        warmup_steps: steps of linear rise from near 0.
        steps: ``cosine`` and ``linear_decay``: step at which ``final_factor`` is reached.
        final_factor: factor from then on.

    Raises:
        ConfigError: an unknown kind, or a falling one without an end after its warm-up.
    """
    if kind not in KINDS:
        raise ConfigError(f"schedule: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if kind in _DECAYING and (steps is None or steps <= warmup_steps):
        raise ConfigError(f"schedule: {kind} needs steps above warmup_steps ({warmup_steps}), "
                          f"found {steps}")
    return LambdaLR(optimizer, LearningRateFactor(kind, warmup_steps, steps or 0, final_factor))
