"""DCN v2 against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlab.models import DCN, CrossNet
from tests.shardlab.models.plain_tables import NUM_DENSE, PlainTables, gradients, make_batch


def crossed(net: CrossNet, x: Tensor) -> Tensor:
    first = x
    for index, up in enumerate(net.up):
        weight = up.weight @ net.down[index] if len(net.down) else up.weight
        x = first * (x @ weight.t() + up.bias) + x
    return x


@pytest.mark.parametrize("rank", [None, 3], ids=["full", "rank=3"])
def test_cross_layers_equal_the_formula(rank: int | None) -> None:
    net, x = CrossNet(10, 3, rank), torch.randn(6, 10)
    torch.testing.assert_close(net(x), crossed(net, x), rtol=1e-5, atol=1e-5)
    weights = sum(p.numel() for p in net.parameters())
    assert weights == 3 * (100 + 10 if rank is None else 2 * 30 + 10)


@pytest.mark.parametrize("parallel", [False, True], ids=["stacked", "parallel"])
def test_equals_the_formula_with_tables_of_different_dimensions(parallel: bool) -> None:
    model = DCN(PlainTables((8, 4, 2)), NUM_DENSE, [12], cross_layers=2, parallel=parallel)
    dense, ids = make_batch(5)
    z = torch.cat([dense, model.ebc(ids).values()], 1)
    assert z.shape[1] == NUM_DENSE + 8 + 4 + 2 + 2
    layer, cross = model.deep.layers[0], crossed(model.cross, z)
    deep = ((z if parallel else cross) @ layer.weight.t() + layer.bias).relu()
    top = torch.cat([cross, deep], 1) if parallel else deep
    expected = top @ model.logit.weight[0] + model.logit.bias
    logits = model(dense, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(model, logits), gradients(model, expected)
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-4, msg=name)
