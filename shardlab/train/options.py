"""What a training run may be told, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.errors import ConfigError
from shardlab.train.checkpoint_writer import SaveOptions

DENSE_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainOptions:
    """How long to train, and what to do on the way.

    Attributes:
        epochs: passes over the training reader.
        max_steps: steps to stop after, over all epochs; None: no limit.
        log_every: steps between two lines of metrics; also how often ranks look at each other's
            stop signals, and the loss is checked to be finite.
        validate_every: steps between two validations, besides the one at each epoch's end.
        checkpoint_every: steps between two checkpoints, besides the one at the end.
        checkpoint_keep: newest checkpoints that are kept.
        checkpoint_background: train on while a checkpoint is written.
        checkpoint_incremental: save only the rows that changed since the last full checkpoint.
        checkpoint_full_every: then, how many checkpoints there are to a full one.
        dense_dtype: ``bf16`` runs the dense layers under autocast; parameters stay fp32.
        tensorboard: write TensorBoard events into the run folder.
        time_phases: time the phases of a step on a GPU too; on a CPU they always are.
        depth, staleness: as `shardlab.prefetching` takes them.
        trace: first steps of this start to record; None: none.
        on_nan: ``stop`` at a loss or gradient that is not finite, or ``skip_batch``.
        stall_timeout_s: seconds without progress after which the run ends; None: never.
        seed: seed of what is random in a step, such as dropout; each rank adds its number.
    """

    epochs: int = 1
    max_steps: int | None = None
    log_every: int = 50
    validate_every: int | None = None
    checkpoint_every: int | None = None
    checkpoint_keep: int = 2
    checkpoint_background: bool = False
    checkpoint_incremental: bool = False
    checkpoint_full_every: int = 8
    dense_dtype: str = "fp32"
    tensorboard: bool = False
    time_phases: bool = False
    on_nan: str = "stop"
    stall_timeout_s: float | None = None
    seed: int = 0
    depth: int | None = None
    staleness: int = 0
    trace: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in ("epochs", "log_every", "checkpoint_keep", "checkpoint_full_every"):
            if getattr(self, name) < 1:
                problems.append(f"train.{name} must be at least 1, found {getattr(self, name)}")
        for name in ("max_steps", "validate_every", "checkpoint_every", "trace"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"train.{name} must be absent or at least 1, found {value}")
        if self.dense_dtype not in DENSE_DTYPES:
            problems.append(f"train.dense_dtype must be one of {', '.join(DENSE_DTYPES)}, found "
                            f"{self.dense_dtype!r}")
        if problems:
            raise ConfigError(problems)

    @property
    def saving(self) -> SaveOptions:
        """How checkpoints are saved."""
        return SaveOptions(self.checkpoint_background, self.checkpoint_incremental,
                           self.checkpoint_full_every, self.checkpoint_keep)
