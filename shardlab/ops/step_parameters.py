"""The numbers of an optimiser step as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

#: Kinds whose state is the mean over a row's columns.
ROW_WISE = ("row_wise_adagrad", "row_wise_adam")
#: Optimiser kind -> number of its rule in the kernels.
RULES = {"sgd": 0, "adagrad": 1, "row_wise_adagrad": 2, "adam": 3, "row_wise_adam": 4}


@dataclass(frozen=True)
class StepParameters:
    """Hyper-parameters of one optimiser step, as the kernels take them.

    Attributes:
        kind: a key of `RULES`.
        scale: multiplies every summed gradient first.
        clip_value: bounds every element of the scaled gradient; 0 for none.
        bias1, bias2: Adam's 1 - beta^t.
        key: of the random bits of encoded rows, `shardlab.codecs.rounding_key`.
        rows: int64 [m]: row of the whole table of every unique, for the random bits, where uniques
            are places of a cache; None: the block's first row + id.
    """

    kind: str
    lr: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    weight_decay: float = 0.0
    scale: float = 1.0
    clip_value: float = 0.0
    bias1: float = 1.0
    bias2: float = 1.0
    key: int = 0
    rows: Tensor | None = field(default=None, compare=False)

    def numbers(self) -> list[float]:
        """The kernels' numbers, in their order; 1 - beta is taken here, where it is exact."""
        return [self.lr, self.eps, self.beta1, self.beta2, 1.0 - self.beta1, 1.0 - self.beta2,
                self.weight_decay, self.scale, self.clip_value, self.bias1, self.bias2]
