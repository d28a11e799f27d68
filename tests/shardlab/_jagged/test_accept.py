"""as_kjt: every accepted form gives the same bags, every other form a clear error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardlab.errors import InputError
from shardlab.jagged import JaggedTensor, KeyedJaggedTensor, as_kjt

KEYS = ["a", "b"]
VALUES = {"a": torch.tensor([1, 2, 3]), "b": torch.tensor([4])}
LENGTHS = {"a": torch.tensor([2, 1]), "b": torch.tensor([0, 1])}
WEIGHTS = {"a": torch.tensor([0.5, 1, 2]), "b": torch.tensor([3.0])}


class Like:
    """The least that a foreign KeyedJaggedTensor has."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def keys(self) -> tuple[str, ...]:
        return tuple(KEYS)

    def values(self) -> torch.Tensor:
        return self._values

    def lengths(self) -> torch.Tensor:
        return torch.cat([LENGTHS[key] for key in KEYS]).int()


class WeightedLike(Like):
    def weights(self) -> torch.Tensor:
        return torch.cat([WEIGHTS[key] for key in KEYS]).double()


class VariableStride(Like):
    def variable_stride_per_key(self) -> bool:
        return True


ALL = torch.cat([VALUES[key] for key in KEYS])
FORMS = {
    "own": KeyedJaggedTensor(KEYS, ALL, lengths=torch.cat([LENGTHS[key] for key in KEYS])),
    "own int32": KeyedJaggedTensor(KEYS, ALL.int(), lengths=torch.tensor([2, 1, 0, 1])),
    "like": Like(ALL.int()),
    "pairs": {key: (VALUES[key], LENGTHS[key]) for key in KEYS},
    "numpy pairs": {key: (VALUES[key].numpy(), LENGTHS[key].numpy()) for key in KEYS},
    "jagged": {key: JaggedTensor(VALUES[key], lengths=LENGTHS[key]) for key in KEYS},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_same_bags(form: str) -> None:
    bags = as_kjt(FORMS[form], KEYS)
    assert bags.keys() == KEYS
    assert bags.values().dtype is torch.int64
    assert bags.values().tolist() == [1, 2, 3, 4]
    assert bags.lengths().tolist() == [2, 1, 0, 1]
    assert bags.weights_or_none() is None


def test_own_bags_are_returned_as_they_are() -> None:
    assert as_kjt(FORMS["own"], KEYS) is FORMS["own"]


@pytest.mark.parametrize("features", [
    WeightedLike(ALL),
    {key: (VALUES[key], LENGTHS[key], WEIGHTS[key]) for key in KEYS},
    {key: JaggedTensor(VALUES[key], WEIGHTS[key].half(), LENGTHS[key]) for key in KEYS},
], ids=["like", "triples", "jagged"])
def test_weights_come_along_as_fp32(features: object) -> None:
    bags = as_kjt(features, KEYS)
    assert bags.weights().dtype is torch.float32
    assert bags.weights().tolist() == [0.5, 1, 2, 3]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("batch", [0, 3], ids=lambda b: f"batch={b}")
def test_dense_matrix_columns_follow_keys(batch: int, dtype: type) -> None:
    ids = np.arange(batch * 2).reshape(batch, 2).astype(dtype)
    for form in (ids, torch.from_numpy(ids)):
        bags = as_kjt(form, KEYS)
        assert bags.fixed_length == 1
        assert bags.values().dtype is torch.int64
        assert bags["b"].values().tolist() == ids[:, 1].tolist()


def test_empty_features() -> None:
    empty = torch.empty(0)  # float32 by default, but no id in it is wrong
    bags = as_kjt({"a": (empty, torch.zeros(2, dtype=torch.int64))}, ["a"])
    assert bags.stride() == 2
    assert bags.values().dtype is torch.int64
    assert as_kjt({}, []).keys() == []


PAIR = (VALUES["a"], LENGTHS["a"])
BAD = {
    "type": ([1, 2], "features: expected a KeyedJaggedTensor.*found list"),
    "entry type": ({"a": VALUES["a"]}, r"feature 'a': expected \(values, lengths\).*found Tensor"),
    "entry size": ({"a": (VALUES["a"],)}, r"feature 'a': expected \(values, lengths\)"),
    "list ids": ({"a": ([1, 2, 3], LENGTHS["a"])}, "feature 'a': values: expected a tensor"),
    "float ids": ({"a": (VALUES["a"].float(), LENGTHS["a"])}, "feature 'a': ids must be integers"),
    "float dense": (torch.ones(3, 2), "ids must be integers, found torch.float32"),
    "bool dense": (torch.ones(3, 2, dtype=torch.bool), "ids must be integers, found torch.bool"),
    "columns": (torch.ones(3, 3, dtype=torch.int64), r"expected \[B, 2\].*found \[3, 3\]"),
    "one dim": (torch.ones(3, dtype=torch.int64), r"expected \[B, 2\].*found \[3\]"),
    "float like": (Like(ALL.float()), r"features \[a, b\]: ids must be integers"),
    "negative": ({"a": (VALUES["a"], torch.tensor([4, -1]))},
                 "feature 'a': the bag of sample 1 has length -1"),
    "sum": ({"a": PAIR, "b": (VALUES["b"], torch.tensor([1, 1]))},
            "feature 'b': lengths add up to 2 ids, values holds 1"),
    "batch": ({"a": PAIR, "b": (VALUES["b"], torch.tensor([1]))},
              "feature 'b': batch of 1, but feature 'a' has a batch of 2"),
    "some weights": ({"a": PAIR, "b": (VALUES["b"], LENGTHS["b"], WEIGHTS["b"])},
                     "feature 'b': either every feature carries weights or none"),
    "weight size": ({"a": (*PAIR, WEIGHTS["b"])}, "feature 'a': weights: 1 found for 3 ids"),
    "variable stride": (VariableStride(ALL), "variable stride"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_refuses(name: str) -> None:
    features, text = BAD[name]
    with pytest.raises(InputError, match=text):
        as_kjt(features, KEYS)
