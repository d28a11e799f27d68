"""Size and work of a job's dense model, by arithmetic: planning needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from shardlab.planner.settings import DenseModel

if TYPE_CHECKING:
    from shardlab.config import JobConfig

_FP32_BYTES = 4
#: fp32 numbers that a dense optimiser keeps for each parameter; SGD keeps one with momentum.
_STATE = {"sgd": 0, "adagrad": 1, "adam": 2, "adamw": 2}
#: A layer's input and output are read and written so often: x read twice and its gradient written;
#: y written, read for its mask, its gradient read.
_LAYER_PASSES = 3
#: Numbers of a cross layer beside its product, per column: forward x0 * y + x, backward four
#: products and sums of three inputs each.
_CROSS_PASSES = 5 + 4 * 3
#: Numbers of a factorisation machine's sums and squares, per column of a vector.
_PAIRWISE_PASSES = 20
#: Products of single samples, 27 x 16 of them, reach a third of a layer's rate. Measured, AVX-512.
_SMALL_PRODUCTS = 3


@dataclass(frozen=True)
class _Work:
    """Parameters; of one sample forward and backward operations, and numbers read and written."""

    parameters: int = 0
    flops: int = 0
    moved: int = 0
    layers: int = 0

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.parameters + other.parameters, self.flops + other.flops,
                     self.moved + other.moved, self.layers + other.layers)


def dense_model(job: JobConfig) -> DenseModel:
    """The dense part of a job, as the planner takes it.

    A product of an [a, b] matrix costs 2 a b operations forward, as many again for the gradient of
    its input, and as many for that of its weights; the first layer over the dense features has no
    gradient of its input. What is done element by element counts as numbers that are moved.
    """
    work = _MODELS[job.model.kind](job)
    optimizer = job.optimizer.dense
    state = _STATE[optimizer.kind] + (optimizer.kind == "sgd" and bool(optimizer.momentum))
    held = 2 + state  # the parameter, its gradient, its state
    # The loss is a part like a layer. A step reads the parameter, its gradient and its state, and
    # writes all but the gradient.
    return DenseModel(bytes=_FP32_BYTES * held * work.parameters, parameters=work.parameters,
                      flops_per_sample=float(work.flops), activations_per_sample=float(work.moved),
                      update_bytes=_FP32_BYTES * (held + 1 + state) * work.parameters,
                      layers=work.layers + 1,
                      dtype=job.dense_dtype, wire=job.wire.dense)


def _layers(sizes: Sequence[int], *, of_data: bool = False) -> _Work:
    """Fully connected layers, biases included.

    Args:
        sizes: columns that go in, then those that each layer puts out.
        of_data: the first layer's input needs no gradient.
    """
    work = _Work()
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        products = 2 if of_data and index == 0 else 3
        work += _Work((inputs + 1) * outputs, 2 * products * inputs * outputs,
                      products * inputs + _LAYER_PASSES * outputs, 1)
    return work


def _dimensions(job: JobConfig) -> list[int]:
    """Columns of every feature."""
    return [table.embedding_dim for table in job.table_configs() for _ in table.feature_names]


def _dlrm(job: JobConfig) -> _Work:
    columns, vectors = _dimensions(job)[0], len(_dimensions(job)) + 1
    bottom = list(job.model.bottom_mlp)
    if not bottom or bottom[-1] != columns:
        bottom.append(columns)
    pairs = vectors * (vectors - 1) // 2
    # Forward the pairs' inner products; backward a full [N, N] x [N, D] product.
    products = 2 * pairs * columns + 2 * vectors * vectors * columns
    crossed = _Work(0, _SMALL_PRODUCTS * products, _LAYER_PASSES * vectors * columns + 2 * pairs, 1)
    return _layers([job.data.num_dense, *bottom], of_data=True) + crossed + \
        _layers([columns + pairs, *job.model.top_mlp, 1])


def _deepfm(job: JobConfig) -> _Work:
    columns = _dimensions(job)[0]
    width = job.data.num_dense + sum(_dimensions(job))
    # The dense features' vectors enter a sum and a sum of squares.
    vectors = _Work(job.data.num_dense * columns, 2 * 2 * 2 * job.data.num_dense * columns,
                    _PAIRWISE_PASSES * (job.data.num_dense * columns + sum(_dimensions(job))), 1)
    return vectors + _layers([width, 1]) + _layers([width, *job.model.top_mlp, 1])


def _dcn(job: JobConfig) -> _Work:
    width, rank = job.data.num_dense + sum(_dimensions(job)), job.model.cross_rank
    cross = _layers([width, width])
    if rank is not None:
        down = _layers([width, rank])
        cross = replace(down, parameters=down.parameters - rank) + _layers([rank, width])
    cross += _Work(moved=_CROSS_PASSES * width)
    work = _Work()
    for _ in range(job.model.cross_layers):
        work += cross
    return work + _layers([width, *job.model.top_mlp, 1])


_MODELS = {"dlrm": _dlrm, "deepfm": _deepfm, "dcn": _dcn}
