"""What a plan may take into account besides tables, machine, batch and optimiser; no NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardlab.table_plan import WireDtypes

if TYPE_CHECKING:
    from shardlab.planner.statistics import Statistics


@dataclass(frozen=True)
class DenseModel:
    """The dense part of the model, as far as a plan depends on it.

    Attributes:
        bytes: what it takes of every rank's hbm: parameters, gradients, optimiser state.
        parameters: fp32 gradients that all ranks reduce in every step.
        flops_per_sample: forward and backward; a multiply-add counts two.
        activations_per_sample: numbers that layers read and write, forward and backward.
        update_bytes: what its optimiser reads and writes in a step.
        layers: parts that run one after another: layers, interactions, the loss.
        dtype: of its products, ``fp32`` or ``bf16``.
        wire: codec of its gradients on the wire.
    """

    bytes: int = 0
    parameters: int = 0
    flops_per_sample: float = 0.0
    activations_per_sample: float = 0.0
    update_bytes: int = 0
    layers: int = 0
    dtype: str = "fp32"
    wire: str = "fp32"


@dataclass(frozen=True)
class Replicas:
    """Groups of ranks that each hold all tables; the topology that is planned for is one group's.

    Attributes:
        groups: how many.
        per_host: how many of them share a host; 1 where a group fills its hosts.
        sync_every_steps: 1: gradients are merged in every step; N: rows are averaged.
    """

    groups: int = 1
    per_host: int = 1
    sync_every_steps: int = 1


@dataclass(frozen=True)
class PlanSettings:
    """What else a plan may take into account.

    Attributes:
        dense: the dense part of the model; its time is part of the step.
        wire: dtypes of rows and gradients on the wire.
        statistics: measured ids; None: the Zipf assumption of `zipf`.
        time_limit: CPU seconds after which the search takes the best plan it has; None: effort is
            limited by counts, and the plan is the same on every machine.
        replicas: groups of ranks that hold all tables.
    """

    dense: DenseModel = field(default_factory=DenseModel)
    wire: WireDtypes = field(default_factory=WireDtypes)
    statistics: Statistics | None = None
    time_limit: float | None = None
    replicas: Replicas = field(default_factory=Replicas)
