"""DLRM against plain modules with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardlab.errors import ConfigError
from shardlab.models import DLRM, MLP
from tests.shardlab.models.plain_tables import NUM_DENSE, PlainTables, gradients, make_batch

BOTTOM, TOP = (20, 8), (33, 12)


def plain_mlp(mlp: MLP, last_relu: bool) -> nn.Sequential:
    """nn.Linear and nn.ReLU over the same parameters."""
    parts: list[nn.Module] = []
    for layer in mlp.layers:
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        linear.weight, linear.bias = layer.weight, layer.bias
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*(parts if last_relu else parts[:-1]))


def plain_forward(model: DLRM, dense: Tensor, ids: Tensor) -> Tensor:
    bottom = plain_mlp(model.bottom, True)(dense)
    vectors = torch.cat([bottom, model.ebc(ids).values()], 1).view(len(dense), -1, 8)
    pairs = [(vectors[:, i] * vectors[:, j]).sum(1)
             for i in range(vectors.shape[1]) for j in range(i + 1, vectors.shape[1])]
    return plain_mlp(model.top, False)(torch.cat([bottom, torch.stack(pairs, 1)], 1)).squeeze(1)


@pytest.mark.parametrize("batch", [1, 19])
def test_equals_plain_modules(batch: int) -> None:
    model = DLRM(PlainTables(), NUM_DENSE, BOTTOM, TOP)
    inputs = make_batch(batch)
    logits, expected = model(*inputs), plain_forward(model, *inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, logits), gradients(model, expected)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-4, msg=name)


def test_parameters_have_the_names_and_shapes_of_plain_layers() -> None:
    model = DLRM(PlainTables(), NUM_DENSE, BOTTOM, TOP)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()
              if not name.startswith("ebc.")}
    assert shapes == {
        "bottom.layers.0.weight": (20, 3), "bottom.layers.0.bias": (20,),
        "bottom.layers.1.weight": (8, 20), "bottom.layers.1.bias": (8,),
        "top.layers.0.weight": (33, 8 + 10), "top.layers.0.bias": (33,),
        "top.layers.1.weight": (12, 33), "top.layers.1.bias": (12,),
        "top.layers.2.weight": (1, 12), "top.layers.2.bias": (1,)}


def test_bottom_mlp_must_end_in_the_embedding_dimension() -> None:
    with pytest.raises(ConfigError, match=r"must end in the embedding dimension 8, found \[20\]"):
        DLRM(PlainTables(), NUM_DENSE, [20], TOP)


def test_tables_of_different_dimensions() -> None:
    with pytest.raises(ConfigError, match=r"dlrm .* table 't1' has 4, 't0' has 8; dcn takes"):
        DLRM(PlainTables((8, 4, 8)), NUM_DENSE, BOTTOM, TOP)
