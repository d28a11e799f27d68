"""Every tolerance of the equality tests, with the reason for its size.

fp32 carries 24 bits: a rounded operation is off by at most UNIT = 2^-24 = 6e-8 of its result, a sum
of n terms in any order by about n * UNIT of the sum of their magnitudes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0 ** -24


@dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= atol + rtol * |expected|, and why that much."""

    rtol: float
    atol: float
    reason: str


EXACT = Tolerance(0.0, 0.0, "the same arithmetic in the same order")

LOOKUP = Tolerance(
    8 * UNIT, 32 * UNIT,
    "a bag of at most 8 ids of rows of magnitude 4: 8 additions, in another order than torch's")

TRAINED = Tolerance(
    64 * UNIT, 128 * UNIT,
    "6 steps: sums of some 30 gradients of magnitude 4 per row, multiplied by lr <= 0.1; SGD does "
    "not amplify a relative error of the summed gradient, and no rule does where sums are exact")

ADAPTIVE = Tolerance(
    64 * UNIT, 1e-3,
    "Adam and Adagrad divide a gradient by its own history: where terms of magnitude 1 cancel to "
    "3e-6, an error of UNIT becomes 2 % of a step of size lr = 0.05; that is one element in some "
    "ten thousand, and the exact-sum jobs hold the formulas to TRAINED")

STATE = Tolerance(
    64 * UNIT, 64 * UNIT,
    "sums of squares of gradients: relative errors double, magnitudes stay near 1")


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tolerance, what: str) -> None:
    """Compares in fp64; the message names ``what``, the tolerance's reason and the worst place."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance.rtol, atol=tolerance.atol,
        msg=lambda text: f"{what}: {text}\nallowed because: {tolerance.reason}")
