"""KeyedTensor: accessors, regroup and refusals."""

from __future__ import annotations

import pytest
import torch

from shardlab.errors import InputError
from shardlab.jagged import KeyedTensor


@pytest.mark.parametrize("batch", [0, 1, 3], ids=lambda b: f"batch={b}")
def test_accessors(batch: int) -> None:
    values = torch.arange(batch * 5.0).view(batch, 5)
    pooled = KeyedTensor(["a", "b"], [2, 3], values)
    assert pooled.keys() == ["a", "b"]
    assert pooled.key_dim() == 1
    assert pooled.length_per_key() == [2, 3]
    assert pooled.offset_per_key() == [0, 2, 5]
    assert torch.equal(pooled["b"], values[:, 2:])
    assert torch.equal(pooled.to_dict()["a"], values[:, :2])
    assert torch.equal(pooled.to("cpu").values(), values)
    assert pooled.device().type == "cpu"
    again = KeyedTensor.from_tensor_list(["a", "b"], [pooled["a"], pooled["b"]])
    assert torch.equal(again.values(), values)
    assert repr(pooled) == f"KeyedTensor([a, b], values=[{batch}, 5])"


def test_gradient_reaches_values_through_a_key() -> None:
    values = torch.ones(2, 5, requires_grad=True)
    KeyedTensor(["a", "b"], [2, 3], values)["b"].sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 0, 1, 1, 1]] * 2


def test_regroup_takes_features_of_all_tensors() -> None:
    left = KeyedTensor(["a", "b"], [1, 2], torch.arange(6.0).view(2, 3))
    right = KeyedTensor(["c"], [1], torch.tensor([[8.0], [9.0]]))
    first, second = KeyedTensor.regroup([left, right], [["c", "a"], ["b"]])
    assert first.tolist() == [[8, 0], [9, 3]]
    assert second.tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(("call", "text"), [
    (lambda: KeyedTensor(["a"], [2], torch.ones(1, 3)), r"1 keys of \[2\] columns do not fit"),
    (lambda: KeyedTensor(["a"], [1, 2], torch.ones(1, 3)), r"1 keys of \[1, 2\] columns"),
    (lambda: KeyedTensor(["abc"], [3], torch.ones(1, 3))["abd"], r"did you mean 'abc'"),
    (lambda: KeyedTensor.regroup([KeyedTensor(["abc"], [3], torch.ones(1, 3))], [["x"]]),
     r"unknown feature 'x'; known: \[abc\]"),
], ids=["columns", "count", "unknown key", "unknown in group"])
def test_refuses(call, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()
