"""Hyper-parameters of row optimisers: checked when made, and turned into a step's numbers."""

from __future__ import annotations

import dataclasses

import pytest

from shardlab import optim
from shardlab.errors import ConfigError
from shardlab.ops.step_parameters import RULES
from shardlab.optim.rules import step_parameters
from shardlab.storage_bytes import OPTIMIZER_STATE

ALL = [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam, optim.RowWiseAdam]


def test_every_kind_has_a_layout_and_a_rule():
    assert [kind.kind for kind in ALL] == list(OPTIMIZER_STATE) == list(RULES)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.kind)
def test_group_holds_every_field(kind):
    made = kind(lr=0.5, clip_value=1.0)
    assert made.group() == {"kind": kind.kind, **dataclasses.asdict(made)}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.kind)
@pytest.mark.parametrize(("field", "value"), [("lr", -0.1), ("lr", float("nan")),
                                              ("clip_norm", -1.0)], ids=str)
def test_negative_number_is_named(kind, field, value):
    with pytest.raises(ConfigError, match=f"{kind.__name__}: {field} must not be negative, found "
                                          f"{value}"):
        kind(**{"lr": 0.1, field: value})


@pytest.mark.parametrize("betas", [(-0.1, 0.9), (0.9, 1.0), (1.5, 0.9)], ids=str)
def test_betas_outside_0_1_are_refused(betas):
    with pytest.raises(ConfigError, match="betas"):
        optim.Adam(lr=0.1, betas=betas)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.kind)
def test_hyper_parameters_are_given_by_name(kind):
    with pytest.raises(TypeError):
        kind(0.1)


def test_step_counts_from_one_in_the_bias_correction():
    group = optim.Adam(lr=0.1, betas=(0.9, 0.99), eps=1e-3).group()
    first, third = step_parameters(group, 1, 0.5), step_parameters(group, 3, 0.5)
    assert (first.kind, first.lr, first.eps, first.scale) == ("adam", 0.1, 1e-3, 0.5)
    assert first.bias1 == pytest.approx(0.1, rel=1e-12)
    assert third.bias1 == pytest.approx(1 - 0.9 ** 3, rel=1e-12)
    assert third.bias2 == pytest.approx(1 - 0.99 ** 3, rel=1e-12)


def test_step_follows_the_group_as_a_schedule_moves_it():
    group = optim.SGD(lr=0.1, weight_decay=0.2, clip_value=3.0).group()
    group["lr"] = 0.025
    step = step_parameters(group, 7, 1.0)
    assert (step.lr, step.weight_decay, step.clip_value) == (0.025, 0.2, 3.0)
