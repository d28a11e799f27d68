"""Optimisers of table rows: their hyper-parameters, and the step they ask of the update kernel.

All are exact: the gradients of a row are summed over the global batch first, then the row takes one
step; rows that no id touched keep still. State is fp32 and lies behind the row (`specs`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from shardlab.errors import ConfigError
from shardlab.ops.step_parameters import StepParameters


@dataclass(frozen=True, kw_only=True)
class RowOptimizer:
    """What all row optimisers share.

    Attributes:
        lr: learning rate.
        clip_value: bounds every element of a row's summed gradient; None for no bound.
        clip_norm: bounds the norm of all rows' summed gradients together; None for no bound. With
            both, the norm is taken and bounded first.
    """

    kind: ClassVar[str]
    lr: float
    clip_value: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not number >= 0:
                    raise ConfigError(f"{type(self).__name__}: {item.name} must not be negative, "
                                      f"found {value!r}")
                if item.name == "betas" and not number < 1:
                    raise ConfigError(f"{type(self).__name__}: betas must be below 1, "
                                      f"found {value!r}")

    def group(self) -> dict[str, Any]:
        """The hyper-parameters as a torch.optim param group (without its parameters)."""
        return {"kind": self.kind, **{item.name: getattr(self, item.name) for item in fields(self)}}


@dataclass(frozen=True, kw_only=True)
class SGD(RowOptimizer):
    """row -= lr * (grad + weight_decay * row), on touched rows."""

    kind: ClassVar[str] = "sgd"
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Adagrad(RowOptimizer):
    """state += grad^2; row -= lr * grad / (sqrt(state) + eps). State: one fp32 per element."""

    kind: ClassVar[str] = "adagrad"
    eps: float = 1e-10


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(RowOptimizer):
    """state += mean(grad^2); row -= lr * grad / (sqrt(state) + eps). State: one fp32 per row.

    The mean is over the whole row, also where its columns lie in several shards.
    Source: arXiv 2104.05158.
    """

    kind: ClassVar[str] = "row_wise_adagrad"
    eps: float = 1e-10


@dataclass(frozen=True, kw_only=True)
class Adam(RowOptimizer):
    """Adam (arXiv 1412.6980) on touched rows; bias correction by the number of steps taken."""

    kind: ClassVar[str] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class RowWiseAdam(RowOptimizer):
    """Adam whose second moment is one fp32 per row, of mean(grad^2) ("partial row-wise Adam")."""

    kind: ClassVar[str] = "row_wise_adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def step_parameters(group: dict[str, Any], step: int, scale: float) -> StepParameters:
    """The numbers of step number ``step`` (from 1) under a param group's present values."""
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    return StepParameters(
        kind=group["kind"], lr=float(group["lr"]), eps=group.get("eps", 0.0), beta1=beta1,
        beta2=beta2, weight_decay=group.get("weight_decay", 0.0), scale=scale,
        clip_value=group["clip_value"] or 0.0, bias1=1.0 - beta1**step, bias2=1.0 - beta2**step)
