"""Layers: initial weights, and which of them a ReLU follows."""

from __future__ import annotations

import pytest
import torch

from shardlab.models import MLP, Layer


def test_initial_weights_spread_as_in_the_reference_code() -> None:
    layer = Layer(300, 200)
    assert layer.weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.03)
    assert layer.bias.std().item() == pytest.approx((1 / 200) ** 0.5, rel=0.2)
    assert layer.weight.mean().abs().item() < 0.002


@pytest.mark.parametrize("last_relu", [True, False])
def test_relu_follows_all_layers_but_maybe_the_last(last_relu: bool) -> None:
    mlp = MLP(4, [6, 5, 3], last_relu)
    assert [layer.relu for layer in mlp.layers] == [True, True, last_relu]
    out = mlp(torch.randn(50, 4))
    assert out.shape == (50, 3)
    assert bool((out < 0).any()) is not last_relu


def test_no_layers_is_the_identity() -> None:
    x = torch.randn(2, 4)
    assert MLP(4, [])(x) is x


def test_printing_a_layer_tells_its_sizes() -> None:
    assert repr(Layer(4, 6, relu=False)) == "Layer(4, 6, relu=False)"
