"""DeepFM against its formula, pair by pair."""

from __future__ import annotations

import pytest
import torch

from shardlab.errors import ConfigError
from shardlab.models import DeepFM
from tests.shardlab.models.plain_tables import NUM_DENSE, PlainTables, make_batch


def test_equals_the_formula() -> None:
    model = DeepFM(PlainTables(), NUM_DENSE, [12])
    with torch.no_grad():
        model.dense_vectors.normal_()
    dense, ids = make_batch(7)
    pooled = model.ebc(ids).values()
    fields = [dense[:, i, None] * model.dense_vectors[i] for i in range(NUM_DENSE)]
    fields += list(pooled.split(8, dim=1))
    pairs = sum((fields[i] * fields[j]).sum(1)
                for i in range(len(fields)) for j in range(i + 1, len(fields)))
    z = torch.cat([dense, pooled], 1)
    first = z @ model.linear.weight[0] + model.linear.bias
    hidden, last = model.deep.layers
    deep = (z @ hidden.weight.t() + hidden.bias).relu() @ last.weight[0] + last.bias
    torch.testing.assert_close(model(dense, ids), first + pairs + deep, rtol=1e-5, atol=1e-4)


def test_first_logits_are_not_ruled_by_large_dense_features() -> None:
    model = DeepFM(PlainTables(), NUM_DENSE, [12])
    dense = torch.full((1, NUM_DENSE), 10.0)
    assert model._pairs(dense, torch.zeros(1, 32)).abs() < 1.0


def test_tables_of_different_dimensions() -> None:
    with pytest.raises(ConfigError, match="deepfm multiplies embeddings with each other"):
        DeepFM(PlainTables((8, 4, 8)), NUM_DENSE, [12])
