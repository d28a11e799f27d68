"""Sizes by arithmetic are those of the models that a job builds."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shardlab.config import load_job
from shardlab.launch.building import build_job_model
from shardlab.launch.dense_model import dense_model

SMALL = "tables={preset: criteo_kaggle, embedding_dim: 8, max_rows: 50}"
MODELS = ["model={kind: dlrm, bottom_mlp: [32, 16], top_mlp: [24, 12]}",
          "model={kind: dlrm, bottom_mlp: [32, 8], top_mlp: []}",
          "model={kind: deepfm, top_mlp: [24, 12]}",
          "model={kind: dcn, top_mlp: [24, 12], cross_layers: 2}",
          "model={kind: dcn, top_mlp: [24], cross_layers: 2, cross_rank: 5}"]


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_of_the_model(model: str) -> None:
    job = load_job(None, [SMALL, model])
    built = build_job_model(job)
    assert dense_model(job).parameters == sum(p.numel() for p in built.parameters())


class Pooled(torch.nn.Module):
    """In the place of the tables: random vectors that want a gradient."""

    def __init__(self, tables: object, columns: int) -> None:
        super().__init__()
        self.tables, self.columns = tables, columns

    def forward(self, features: int) -> Pooled:
        self.held = torch.randn(features, self.columns, requires_grad=True)
        return self

    def values(self) -> torch.Tensor:
        return self.held


@pytest.mark.parametrize("model", MODELS[:4])
def test_operations_are_those_that_torch_counts(model: str, monkeypatch) -> None:
    """Layers as plain torch products, which torch counts; the interaction it does not see."""
    from shardlab.models import mlp

    monkeypatch.setattr(mlp, "linear_relu", lambda x, weight, bias, relu: torch.nn.functional
                        .linear(x, weight, bias))
    monkeypatch.setattr("shardlab.models.dcn.linear_relu",
                        lambda x, weight, bias, relu: torch.nn.functional.linear(x, weight, bias))
    job = load_job(None, [SMALL, model])
    built, batch = build_job_model(job), 16
    built.ebc = Pooled(built.ebc.tables, 26 * 8)
    with FlopCounterMode(display=False) as counted:
        built(torch.randn(batch, 13), batch).sum().backward()
    # Products of single samples count threefold.
    crossed = 3 * (2 * (27 * 26 // 2) * 8 + 2 * 27 * 27 * 8) if "dlrm" in model else 0
    assert dense_model(job).flops_per_sample - crossed == pytest.approx(
        counted.get_total_flops() / batch, rel=0.02)


@pytest.mark.parametrize(("optimizer", "held", "moved"), [
    ("{kind: adam}", 4, 7), ("{kind: adagrad}", 3, 5), ("{kind: sgd}", 2, 3),
    ("{kind: sgd, momentum: 0.9}", 3, 5), ("{kind: sgd, momentum: 0.0}", 2, 3)])
def test_bytes_count_parameters_gradients_and_state(optimizer: str, held: int,
                                                    moved: int) -> None:
    job = load_job(None, [SMALL, f"optimizer.dense={optimizer}", "dense_dtype=bf16"])
    found = dense_model(job)
    assert found.bytes == 4 * held * found.parameters
    assert found.update_bytes == 4 * moved * found.parameters
    assert found.dtype == "bf16"
