"""Options refuse what cannot be, all problems at once."""

from __future__ import annotations

import pytest

from shardlab.errors import ConfigError
from shardlab.train.options import TrainOptions


def test_defaults_are_valid() -> None:
    assert TrainOptions() == TrainOptions(epochs=1, log_every=50, dense_dtype="fp32")


def test_every_problem_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainOptions(epochs=0, log_every=0, max_steps=0, checkpoint_every=-1, dense_dtype="fp8")
    assert caught.value.problems == [
        "train.epochs must be at least 1, found 0",
        "train.log_every must be at least 1, found 0",
        "train.max_steps must be absent or at least 1, found 0",
        "train.checkpoint_every must be absent or at least 1, found -1",
        "train.dense_dtype must be one of fp32, bf16, found 'fp8'",
    ]
