"""What every model promises: shapes, an empty batch, autocast, seeds, learning something."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardlab.models import MODELS, build_model
from tests.shardlab.models.plain_tables import NUM_DENSE, PlainTables, gradients, make_batch

SIZES = {"bottom_mlp": (16,), "top_mlp": (24, 9), "cross_layers": 2}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build_model(request.param, PlainTables(), NUM_DENSE, **SIZES)


@pytest.mark.parametrize("batch", [1, 5])
def test_one_logit_per_sample(model: nn.Module, batch: int) -> None:
    logits = model(*make_batch(batch))
    assert logits.shape == (batch,)
    assert all(grad.isfinite().all() for grad in gradients(model, logits).values())


def test_empty_batch_gives_zero_gradients(model: nn.Module) -> None:
    logits = model(*make_batch(0))
    assert logits.shape == (0,)
    assert all((grad == 0).all() for grad in gradients(model, logits).values())


def test_bf16_autocast_stays_near_fp32(model: nn.Module) -> None:
    batch = make_batch(32)
    exact, exact_grads = model(*batch), gradients(model, model(*batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(*batch)
    # bf16 carries 8 bits: some 2^-8 of the largest element per layer, four layers.
    assert (logits.float() - exact).abs().max() < 2**-5 * exact.abs().max()
    for name, grad in gradients(model, logits).items():
        assert grad.dtype == torch.float32, name
        assert (grad - exact_grads[name]).norm() < 0.1 * exact_grads[name].norm(), name


def test_torch_seed_decides_the_initial_weights() -> None:
    def weights(kind: str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = build_model(kind, PlainTables(), NUM_DENSE, **SIZES)
        return [p.detach() for p in model.parameters()]

    for kind in MODELS:
        assert all(torch.equal(a, b) for a, b in zip(weights(kind), weights(kind), strict=True))


def test_learns_a_rule_of_dense_and_sparse_features(model: nn.Module) -> None:
    dense, ids = make_batch(256)
    labels = ((dense[:, 0] > 0) & (ids[:, 1] < 6)).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, ids), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_no_dense_features() -> None:
    for kind in MODELS:
        model = build_model(kind, PlainTables(), 0, **SIZES)
        logits = model(torch.zeros(4, 0), make_batch(4)[1])
        logits.sum().backward()
        assert logits.isfinite().all()
