"""Initial cores whose products are distributed like the rows of a plain table.

A plain table starts with entries of variance v (1 / (3 n) by default). An entry of a product of d
cores is a sum over r_1 .. r_(d-1) paths of products of d entries, so cores of variance

    s^2 = (v / (r_1 .. r_(d-1)))^(1/d)

give products of variance v. How close to a Gaussian these are depends on how much the squares of
the cores' entries vary: ``sampled_gaussian`` keeps only the tails |x| >= 2 of a Gaussian, whose
squares vary by 0.1 of their mean squared, against 2 for a Gaussian and 0.8 for a uniform one.

Cores that are equally small learn badly: a gradient of one is multiplied by the others, so a row
moves little at first and then, as they all grow, ever more, and rows that share a slice move with
it. ``isometric`` puts the variance v into the middle core and gives the others entries of variance
1 / r, such that products with them keep lengths: a step on the middle core moves its row as a step
on a plain table would, and moves a row that shares the slice by the cosine between random vectors
of r elements, 1 / r of it after both sides. Rules that divide by the size of past gradients lose
the size of a slice, and get it back as a multiple of the learning rate (`lr_multiples`).

An entry follows from (seed, table, core, slice, place in the slice) alone, so every sharding
starts from the same table. Source: arXiv 2101.11714, with the paths and the variance of the tails
taken into account, which the published code leaves out; ``isometric``: own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardlab.errors import ConfigError
from shardlab.ops.init import table_seed, unit_uniform
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage_specs import TensorTrainSpec
from shardlab.tensor_train_shapes import TensorTrainShape

#: Entries of sampled cores are at least so many standard deviations from zero (the paper's code).
TAIL = 2.0
_TAIL_MASS = 0.5 * math.erfc(TAIL / math.sqrt(2.0))
_TAIL_DENSITY = math.exp(-TAIL**2 / 2) / math.sqrt(2 * math.pi)
#: Variance of a Gaussian whose entries below `TAIL` are dropped: 5.75.
TAIL_VARIANCE = 1.0 + TAIL * _TAIL_DENSITY / _TAIL_MASS
#: The middle core's pace: of 1, 2, 3 and 5 the best on held-out training rows (docs).
MIDDLE_PACE = 3.0


def init_core(table: EmbeddingBagConfig, whole: TensorTrainShape, number: int,
              area: tuple[range, range], init: str, seed: int) -> Tensor:
    """Initial entries of slices of a core.

    Args:
        table: its `init_range` gives the variance of the products.
        whole: shape of the table.
        number: of the core.
        area: slices, and columns of the core, that are wanted.
        init: a member of `TENSOR_TRAIN_INITS`.
        seed: of the run.

    Returns:
        fp32 [slices, elements], laid out as `shardlab.ops.tensor_train.TensorTrain` wants it.

    Raises:
        ConfigError: the table asks for weights that are not centred on zero.
    """
    low, high = table.init_range
    if low != -high:
        raise ConfigError(f"table {table.name!r}: weight_init_min {low:g} and weight_init_max "
                          f"{high:g}: a tensor train starts centred on zero; take equal bounds of "
                          "both signs")
    before, _, columns, after = whole.core_shapes[number]
    last = number == len(whole.row_factors) - 1
    slices, wanted = (torch.arange(part.start, part.stop) for part in area)
    shape = (wanted.numel(), before * after) if last else (before, wanted.numel(), after)
    # Elements are numbered as in a whole slice, [q][r] of the last core and [r][q][r] elsewhere.
    inner = wanted[:, None] * before + torch.arange(before) if last else \
        (torch.arange(before)[:, None, None] * columns + wanted[:, None]) * after \
        + torch.arange(after)
    counter = slices[:, None] * (before * columns * after) + inner.reshape(1, -1)
    unit = unit_uniform(table_seed(seed, f"{table.name}/core{number}"), counter)
    variance = (high - low) ** 2 / 12
    scale = isometric_scale(whole, number, variance) if init == "isometric" else \
        core_scale(whole, variance)
    return (scale * _spread(unit, init)).float().view(slices.numel(), math.prod(shape))


def lr_multiples(spec: TensorTrainSpec, whole: TensorTrainShape, optimizer: str) -> list[float]:
    """The learning rate of every core as a multiple of the rows'.

    A rule that divides by the root mean square of past gradients moves a row of D columns by
    lr sqrt(D), and a slice of E elements by lr sqrt(E), however small its gradient. With
    ``isometric`` slices move as far as rows: sqrt(D / E); those of the middle core, which hold what
    rows learn, `MIDDLE_PACE` times that. SGD keeps the size of gradients, and needs nothing.
    """
    multiples = []
    for core, (before, _, columns, after) in enumerate(whole.core_shapes):
        balanced = 1.0
        if spec.init == "isometric" and optimizer != "sgd":
            balanced = math.sqrt(math.prod(whole.column_factors) / (before * columns * after))
            balanced *= MIDDLE_PACE if core == len(whole.row_factors) // 2 else 1.0
        multiples.append(spec.lr_scale * balanced)
    return multiples


def isometric_scale(shape: TensorTrainShape, number: int, variance: float) -> float:
    """Standard deviation of a core's entries: the middle one has that of the products."""
    middle = len(shape.row_factors) // 2
    if number == middle:
        return math.sqrt(variance)
    return 1 / math.sqrt(shape.ranks[number + 1] if number < middle else shape.ranks[number])


def core_scale(shape: TensorTrainShape, variance: float) -> float:
    """Standard deviation of the cores' entries whose products have this variance."""
    cores = len(shape.row_factors)
    return math.exp((math.log(max(variance, 1e-300)) - math.log(math.prod(shape.ranks)))
                    / (2 * cores))


def _spread(unit: Tensor, init: str) -> Tensor:
    """Uniform numbers in (0, 1), fp64, as a distribution of variance 1 around zero."""
    if init == "uniform":
        return (2 * unit - 1) * math.sqrt(3.0)
    if init == "gaussian":
        return torch.special.ndtri(unit)
    # Tails for isometric cores, too: their lengths vary least.
    # The lower half becomes the lower tail, the upper half the upper one.
    below = torch.where(unit < 0.5, unit, 1 - unit) * (2 * _TAIL_MASS)
    tail = -torch.special.ndtri(below) / math.sqrt(TAIL_VARIANCE)
    return torch.where(unit < 0.5, -tail, tail)
