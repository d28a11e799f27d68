"""Sections of a job become models and optimisers with exactly the values given."""

from __future__ import annotations

import pytest
import torch

from shardlab.config import load_job
from shardlab.launch.building import (
    ROW_OPTIMIZERS,
    build_job_model,
    build_row_optimizer,
    build_train_options,
    dense_optimizer,
)
from shardlab.models import DCN, DLRM, DeepFM
from shardlab.optim import SGD, Adam, RowWiseAdagrad
from shardlab.storage_bytes import OPTIMIZER_STATE

SMALL = "tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 50}"


@pytest.mark.parametrize(("overrides", "kind"), [
    (["model={kind: dlrm, bottom_mlp: [8], top_mlp: [8]}"], DLRM),
    (["model={kind: deepfm, top_mlp: [8]}"], DeepFM),
    (["model={kind: dcn, top_mlp: [8], cross_layers: 2, cross_rank: 3}"], DCN),
])
def test_model_kinds(overrides, kind):
    model = build_job_model(load_job(None, [SMALL, *overrides]))
    assert type(model) is kind
    assert len(model.ebc.tables) == 26


def test_initial_weights_follow_from_the_seed():
    models = [build_job_model(load_job(None, [SMALL, f"train.seed={seed}"])) for seed in (1, 1, 2)]
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_bottom_mlp_is_completed_to_the_embedding_dimension():
    for widths in ("[8, 4]", "[8]", "[8, 16]"):
        job = load_job(None, [SMALL, f"model={{kind: dlrm, bottom_mlp: {widths}}}"])
        last = list(build_job_model(job).bottom.parameters())[-1]
        assert last.shape == (4,)


@pytest.mark.parametrize(("section", "expected"), [
    ("{kind: sgd, lr: 0.5, weight_decay: 0.1}", SGD(lr=0.5, weight_decay=0.1)),
    ("{kind: adam, lr: 0.1, betas: [0.8, 0.9], clip_value: 2}",
     Adam(lr=0.1, betas=(0.8, 0.9), clip_value=2.0)),
    ("{kind: row_wise_adagrad, eps: 1e-6, clip_norm: 3}",
     RowWiseAdagrad(lr=0.05, eps=1e-6, clip_norm=3.0)),
    ("{}", RowWiseAdagrad(lr=0.05)),
])
def test_row_optimizers(section, expected):
    job = load_job(None, [f"optimizer.sparse={section}"])
    assert build_row_optimizer(job.optimizer.sparse) == expected


def test_every_row_optimizer_can_be_named():
    assert set(ROW_OPTIMIZERS) == set(OPTIMIZER_STATE)
    for kind in ROW_OPTIMIZERS:
        job = load_job(None, [f"optimizer.sparse={{kind: {kind}}}"])
        assert build_row_optimizer(job.optimizer.sparse).kind == kind


@pytest.mark.parametrize(("section", "kind", "values"), [
    ("{kind: sgd, lr: 0.5, momentum: 0.9}", torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}),
    ("{kind: adagrad, eps: 1e-6}", torch.optim.Adagrad, {"lr": 0.001, "eps": 1e-6}),
    ("{kind: adam, betas: [0.8, 0.9]}", torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-8}),
    ("{kind: adamw, weight_decay: 0.3}", torch.optim.AdamW, {"weight_decay": 0.3}),
])
def test_dense_optimizers(section, kind, values):
    job = load_job(None, [f"optimizer.dense={section}"])
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = dense_optimizer(job.optimizer.dense)([weight])
    assert isinstance(optimizer, kind)
    assert values.items() <= optimizer.param_groups[0].items()
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(weight.detach(), torch.ones(3))


def test_train_options_are_the_job_s():
    job = load_job(None, ["train.max_steps=7", "dense_dtype=bf16", "train.checkpoint_every=3",
                          "train.seed=5"])
    options = build_train_options(job)
    assert (options.max_steps, options.dense_dtype, options.checkpoint_every, options.seed) == \
        (7, "bf16", 3, 5)
