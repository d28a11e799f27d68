"""Sums over ranks: the native face against plain torch."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.piece_sum import sum_pieces_, sum_pieces_reference_
from shardlab.ops.registry import face_of


@pytest.mark.parametrize("scale", [1.0, 0.5, 1 / 3])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_native_equals_reference_bit_by_bit(ranks, count, scale, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", "native")
    if face_of("sum_pieces", "cpu") != "native":
        pytest.skip("no native face here")
    whole = torch.randn(ranks, count) * 10.0 ** torch.randint(-6, 6, (ranks, 1))
    for rank in range(ranks):
        others = torch.cat([whole[:rank], whole[rank + 1:]])
        expected = sum_pieces_reference_(whole[rank].clone(), others, rank, scale)
        assert sum_pieces_(whole[rank].clone(), others, rank, scale).equal(expected)


def test_order_is_that_of_ranks_and_what_is_not_finite_stays():
    terms = torch.tensor([[1e30, torch.inf], [-1e30, 1.0], [1.0, -torch.inf]])
    for rank in range(3):
        others = torch.cat([terms[:rank], terms[rank + 1:]])
        found = sum_pieces_(terms[rank].clone(), others, rank)
        assert found[0] == 1.0
        assert found[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    own, others = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([[3.0, 5.0]], dtype=dtype)
    assert sum_pieces_(own, others, 0, 0.5).tolist() == [2.0, 3.5]
