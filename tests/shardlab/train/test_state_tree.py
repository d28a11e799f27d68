"""Nested state survives the way through JSON and tensors, and nothing needs pickle."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from shardlab.errors import CheckpointError
from shardlab.train.state_tree import flatten_state, unflatten_state


def round_trip(state: object) -> object:
    tree, tensors = flatten_state(state)
    return unflatten_state(json.loads(json.dumps(tree)), tensors)


@pytest.mark.parametrize("state", [
    None, True, 3, -0.1, 1e-320, float("inf"), "text", [], {}, (), (1, (2, [3])), [None, {"a": 1}],
    {0: "int key", "0": "str key"}, {(1, 2): "tuple key"}, {"@": "the mark as a key"},
    {"nested": {"@": {"@": "tensor"}}},
], ids=repr)
def test_plain_values_come_back_equal_and_of_the_same_type(state: object) -> None:
    found = round_trip(state)
    assert found == state
    assert type(found) is type(state)


@pytest.mark.parametrize("tensor", [
    torch.tensor(1.5), torch.empty(0, 3), torch.arange(6).view(2, 3).t(),
    torch.tensor([1.0, float("nan")], dtype=torch.bfloat16), torch.tensor([True, False]),
], ids=["scalar", "empty", "strided", "bf16_nan", "bool"])
def test_tensors_come_back_bit_identical(tensor: torch.Tensor) -> None:
    found = round_trip({"state": {0: {"exp_avg": tensor}}})["state"][0]["exp_avg"]
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert torch.equal(found.contiguous().reshape(-1).view(torch.uint8),
                       tensor.contiguous().reshape(-1).view(torch.uint8))


def test_tensor_names_tell_their_place() -> None:
    _, tensors = flatten_state({"state": {0: {"exp_avg": torch.zeros(1)}}, "list": [torch.ones(1)]})
    assert sorted(tensors) == ["/list/0", "/state/0/exp_avg"]


@pytest.mark.parametrize("array", [np.arange(4, dtype=np.uint32), np.zeros((2, 0)),
                                   np.array([[1.5], [2.5]], np.float16)],
                         ids=["uint32", "empty", "fp16"])
def test_numpy_arrays_come_back_equal(array: np.ndarray) -> None:
    found = round_trip([array])[0]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_generator_states_come_back(seed: int) -> None:
    state = round_trip({"python": random.getstate(), "numpy": np.random.get_state()})
    expected = random.random(), np.random.rand()
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.parametrize(("state", "text"), [
    ({"a": [object()]}, "state '/a/0': cannot save a object without pickle"),
    ({"f": lambda: None}, "state '/f': cannot save a function"),
    ({"n": np.float64(1.0)}, "state '/n': cannot save a float64"),
    (np.array(["text"]), "state '<root>': cannot save a ndarray"),
], ids=["object", "function", "numpy_scalar", "text_array"])
def test_other_types_are_refused_by_place(state: object, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        flatten_state(state)


def test_missing_tensor_and_unknown_mark_are_refused() -> None:
    with pytest.raises(CheckpointError, match="names tensor 'w', which is not stored"):
        unflatten_state({"@": "tensor", "name": "w"}, {})
    with pytest.raises(CheckpointError, match="unknown mark 'pickle'"):
        unflatten_state([{"@": "pickle"}], {})
