"""Cases of tbe_cpu.py, and what a framework is to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from benchlib import CRITEO_KAGGLE_ROWS


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    dim: int
    batch: int
    pooling: int

    @property
    def lookups(self) -> int:
        return len(self.rows) * self.batch * self.pooling


CASES = {
    "a": Case((100_000,) * 26, 64, 2048, 1),
    "b": Case((1_000_000,) * 8, 128, 1024, 20),
    "c": Case((10_000_000,), 32, 8192, 1),
    "d": Case(tuple(CRITEO_KAGGLE_ROWS), 16, 2048, 1),
}
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "fp16_sr": 2, "bf16": 2}
LEARNING_RATE = 0.01


class Step(ABC):
    """One framework's train step. forward() and backward() are timed; prepare() is not."""

    dtypes: tuple[str, ...] = ("fp32",)
    optimizers: tuple[str, ...] = ()

    @abstractmethod
    def __init__(self, case: Case, dtype: str, optimizer: str):
        """Builds the tables and their optimizer."""

    @abstractmethod
    def prepare(self, ids: np.ndarray):
        """ids is [tables, batch * pooling]; returns what forward() takes."""

    @abstractmethod
    def forward(self, batch):
        """Looks up and pools."""

    @abstractmethod
    def backward(self, output) -> None:
        """Backward with a fixed gradient of the pooled output, update included."""

    def touch_state(self) -> None:
        """Make the optimizer state resident (called once, after the first step)."""
        return
