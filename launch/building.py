"""From the sections of a job to the objects that they describe: model, optimisers, schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardlab.launch.eager import eager
from shardlab.models import build_model
from shardlab.optim import SGD, Adagrad, Adam, RowOptimizer, RowWiseAdagrad, RowWiseAdam
from shardlab.sharded import EmbeddingBagCollection
from shardlab.train import TrainOptions

if TYPE_CHECKING:
    from shardlab.config import JobConfig
    from shardlab.config.models import DenseOptimizerConfig, SparseOptimizerConfig

#: kind of a row optimiser -> its class.
ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    rule.kind: rule for rule in (SGD, Adagrad, RowWiseAdagrad, Adam, RowWiseAdam)}

_DENSE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW}


def build_job_model(job: JobConfig) -> nn.Module:
    """The model of a job over its tables; initial weights follow from ``train.seed``."""
    torch.manual_seed(job.train.seed)
    collection = EmbeddingBagCollection(job.table_configs())
    return build_model(job.model.kind, collection, job.data.num_dense,
                       **job.model.model_dump(exclude={"kind"}))


def build_row_optimizer(section: SparseOptimizerConfig) -> RowOptimizer:
    """The tables' optimiser."""
    return ROW_OPTIMIZERS[section.kind](**_given(section))


def dense_optimizer(
    section: DenseOptimizerConfig,
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """What makes the optimiser of the dense parameters, once these are known."""
    kind = eager(_DENSE_OPTIMIZERS[section.kind])
    return lambda parameters: kind(parameters, fused=True, **_given(section))  # type: ignore[call-arg]


def build_train_options(job: JobConfig) -> TrainOptions:
    """What the trainer is told."""
    train = job.train
    return TrainOptions(
        epochs=train.epochs, max_steps=train.max_steps, log_every=train.log_every,
        validate_every=train.validate_every, checkpoint_every=train.checkpoint_every,
        checkpoint_keep=train.checkpoint_keep,
        checkpoint_background=train.checkpoint_background,
        checkpoint_incremental=train.checkpoint_incremental,
        checkpoint_full_every=train.checkpoint_full_every, dense_dtype=job.dense_dtype,
        tensorboard=train.tensorboard, time_phases=train.time_phases, on_nan=train.on_nan,
        stall_timeout_s=train.stall_timeout_s, seed=train.seed,
        depth=job.exchange.depth, staleness=job.exchange.staleness, trace=train.trace)


def _given(section: Any) -> dict[str, Any]:
    """The hyper-parameters that the job gives; the rules have defaults for the others."""
    return section.model_dump(exclude={"kind"}, exclude_none=True)  # type: ignore[no-any-return]
