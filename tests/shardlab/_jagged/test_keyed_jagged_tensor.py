"""KeyedJaggedTensor: accessors, parts, moves and refusals."""

from __future__ import annotations

import pytest
import torch

from shardlab.errors import InputError
from shardlab.jagged import JaggedTensor, KeyedJaggedTensor

KEYS = ["user", "item", "empty"]
LENGTHS = [1, 2, 0, 3, 0, 0]  # batch of 2


def ragged(weighted: bool = False, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    weights = torch.arange(6) / 2 if weighted else None
    return KeyedJaggedTensor(KEYS, torch.arange(6), weights,
                             lengths=torch.tensor(LENGTHS, dtype=dtype))


def same(left: KeyedJaggedTensor, right: KeyedJaggedTensor) -> bool:
    pairs = [(left.values(), right.values()), (left.lengths(), right.lengths()),
             (left.offsets(), right.offsets())]
    if left.weights_or_none() is not None or right.weights_or_none() is not None:
        pairs.append((left.weights(), right.weights()))
    return left.keys() == right.keys() and left.stride() == right.stride() and \
        left.length_per_key() == right.length_per_key() and all(torch.equal(*p) for p in pairs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["dtype=int32", "dtype=int64"])
def test_accessors_ragged_bags(dtype: torch.dtype) -> None:
    bags = ragged(dtype=dtype)
    assert bags.stride() == 2
    assert bags.length_per_key() == [3, 3, 0]
    assert bags.offset_per_key() == [0, 3, 6, 6]
    assert bags.offsets().tolist() == [0, 1, 3, 3, 6, 6, 6]
    assert bags.offsets().dtype is bags.lengths().dtype is torch.int64
    assert bags.fixed_length is None
    assert bags["item"].values().tolist() == [3, 4, 5]
    assert bags["item"].lengths().tolist() == [0, 3]
    assert bags["item"].offsets().tolist() == [0, 0, 3]
    assert len(bags["empty"].values()) == 0
    assert repr(bags) == "KeyedJaggedTensor([user, item, empty], stride=2, ids=6 int64)"


def test_from_offsets_equals_from_lengths() -> None:
    bags = ragged(weighted=True)
    again = KeyedJaggedTensor.from_offsets_sync(KEYS, bags.values(), bags.offsets().int(),
                                                bags.weights())
    assert same(again, bags)
    assert same(KeyedJaggedTensor.from_lengths_sync(KEYS, bags.values(), bags.lengths(),
                                                    bags.weights(), stride=2), bags)
    both = KeyedJaggedTensor(KEYS, bags.values(), bags.weights(), bags.lengths(), bags.offsets())
    assert same(both, bags)


@pytest.mark.parametrize("batch", [0, 1, 3], ids=lambda b: f"batch={b}")
def test_from_dense_one_id_per_bag(batch: int) -> None:
    ids = torch.arange(batch * 2).view(batch, 2)
    bags = KeyedJaggedTensor.from_dense(["a", "b"], ids)
    assert bags.fixed_length == 1
    assert bags.stride() == batch
    assert bags.length_per_key() == [batch, batch]
    assert bags._lengths is None  # made only when asked for
    assert bags._offsets is None
    assert torch.equal(bags.values().view(2, batch), ids.t())
    explicit = KeyedJaggedTensor(["a", "b"], bags.values(),
                                 lengths=torch.ones(2 * batch, dtype=torch.int64))
    assert same(bags, explicit)


@pytest.mark.parametrize("size", [0, 2], ids=lambda s: f"fixed_length={s}")
def test_fixed_length_matches_lengths(size: int) -> None:
    values = torch.arange(6 * size)
    bags = KeyedJaggedTensor(["a", "b"], values, fixed_length=size, stride=3)
    assert same(bags, KeyedJaggedTensor(["a", "b"], values, lengths=torch.full((6,), size)))
    left, right = bags.split([1, 1])
    assert left.fixed_length == right.fixed_length == size
    assert same(KeyedJaggedTensor.concat([left, right]), bags)
    assert KeyedJaggedTensor.concat([left, right]).fixed_length == size


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_permute_and_split_keep_every_bag(weighted: bool) -> None:
    bags = ragged(weighted)
    moved = bags.permute([2, 1, 0])
    assert moved.keys() == KEYS[::-1]
    for key in KEYS:
        assert torch.equal(moved[key].values(), bags[key].values())
        assert torch.equal(moved[key].lengths(), bags[key].lengths())
        if weighted:
            assert torch.equal(moved[key].weights(), bags[key].weights())
    assert same(moved.permute([2, 1, 0]), bags)
    assert bags.permute([0, 1, 2]) is bags
    assert bags.permute([1]).values().tolist() == [3, 4, 5]
    assert bags.permute([]).stride() == 2
    parts = bags.split([1, 0, 2])
    assert [part.keys() for part in parts] == [["user"], [], ["item", "empty"]]
    assert same(KeyedJaggedTensor.concat([parts[0], parts[2]]), bags)
    assert same(KeyedJaggedTensor.from_jt_dict(bags.to_dict()), bags)


def test_empty_batch_and_no_feature() -> None:
    nothing = KeyedJaggedTensor(["a", "b"], torch.empty(0, dtype=torch.int64),
                                lengths=torch.empty(0, dtype=torch.int64))
    assert nothing.stride() == 0
    assert nothing.length_per_key() == [0, 0]
    assert nothing.offsets().tolist() == [0]
    assert nothing.permute([1, 0]).keys() == ["b", "a"]
    empty = KeyedJaggedTensor.empty(is_weighted=True)
    assert empty.keys() == []
    assert empty.stride() == len(empty.weights()) == 0
    assert empty.to_dict() == {}


def test_to_keeps_what_was_read() -> None:
    bags = ragged(weighted=True)
    assert bags.to("cpu") is bags
    moved = bags.to("meta")  # a read of a meta tensor would raise
    assert moved.device().type == "meta"
    assert moved.length_per_key() == [3, 3, 0]
    assert moved.weights().device.type == "meta"


def test_jagged_tensor_to_dense() -> None:
    bags = JaggedTensor(torch.tensor([7, 8, 9]), lengths=torch.tensor([2, 0, 1]))
    assert [bag.tolist() for bag in bags.to_dense()] == [[7, 8], [], [9]]
    assert bags.to_padded_dense(padding_value=-1).tolist() == [[7, 8], [-1, -1], [9, -1]]
    assert bags.to_padded_dense(1).tolist() == [[7], [0], [9]]
    again = JaggedTensor(torch.tensor([7, 8, 9]), offsets=torch.tensor([0, 2, 2, 3]))
    assert torch.equal(again.lengths(), bags.lengths())
    assert bags.weights_or_none() is None
    assert repr(bags.to("cpu")) == "JaggedTensor(bags=3, ids=3 int64)"


def test_weights_absent_raises() -> None:
    with pytest.raises(InputError, match=r"weights\(\) asked, but the ids carry none"):
        ragged().weights()
    assert ragged().weights_or_none() is None


def test_unknown_key_names_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown feature 'iten' \(did you mean 'item'\?\)"):
        ragged()["iten"]


IDS = torch.arange(4)
BAD = {
    "no lengths": ({}, "give lengths, offsets or fixed_length; found none"),
    "repeated key": ({"keys": ["a", "a"], "lengths": [2, 2]}, r"keys: found \['a'\] more than"),
    "float lengths": ({"lengths": [2.0, 2.0]}, "lengths: expected int32 or int64, found torch.fl"),
    "2-D lengths": ({"lengths": [[2, 2]]}, r"lengths: expected a 1-D tensor, found shape \[1, 2\]"),
    "sum": ({"lengths": [2, 1]}, r"lengths add up to 3 ids, values holds 4"),
    "negative": ({"lengths": [5, -1]}, "feature 'b': the bag of sample 0 has length -1"),
    "not divisible": ({"lengths": [2, 1, 1]}, "3 bags found; they do not divide by 2 keys"),
    "stride": ({"lengths": [2, 2], "stride": 3}, "stride: 3 given, but 2 bags of 2 keys"),
    "offset start": ({"offsets": [1, 2, 5]}, "offsets: must start at 0, found 1"),
    "offset order": ({"offsets": [0, 5, 4]}, "the bag of sample 0 has length -1"),
    "empty offsets": ({"offsets": torch.empty(0, dtype=torch.int64)}, "offsets: empty"),
    "both differ": ({"offsets": [0, 2, 4], "lengths": [1, 3]}, "both given and differ"),
    "both sizes": ({"offsets": [0, 4], "lengths": [1, 3]}, "of different bags"),
    "both kinds": ({"fixed_length": 2, "lengths": [2, 2]}, "fixed_length stands in place"),
    "fixed": ({"fixed_length": 3}, "4 ids do not divide into bags of 3"),
    "weights": ({"lengths": [2, 2], "weights": [1.0]}, "weights: 1 found for 4 ids"),
    "int weights": ({"lengths": [2, 2], "weights": [1, 1, 1, 1]}, "expected floating point"),
    "2-D values": ({"lengths": [2, 2], "values": IDS.view(2, 2)}, "values: expected a 1-D"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_constructor_refuses(name: str) -> None:
    arguments, text = BAD[name]
    tensors = {key: torch.tensor(value) if isinstance(value, list) and key != "keys" else value
               for key, value in arguments.items()}
    with pytest.raises(InputError, match=text):
        KeyedJaggedTensor(**{"keys": ["a", "b"], "values": IDS, **tensors})


def test_constructor_refuses_a_list_of_values() -> None:
    with pytest.raises(InputError, match="values: expected a 1-D tensor, found list"):
        KeyedJaggedTensor(["a"], [1, 2], lengths=torch.tensor([2]))  # type: ignore[arg-type]


@pytest.mark.parametrize(("call", "text"), [
    (lambda bags: bags.split([1, 1]), r"segments \[1, 1\] do not add up to 3 keys"),
    (lambda bags: bags.permute([0, 0]), r"permute: \[0, 0\] must be distinct"),
    (lambda bags: bags.permute([3]), "must be distinct indices of 3 keys"),
    (lambda bags: KeyedJaggedTensor.concat([]), r"found batches \[\]"),
    (lambda bags: KeyedJaggedTensor.concat([bags, ragged(True)]), r"weighted \[False, True\]"),
    (lambda bags: KeyedJaggedTensor.from_dense(["a"], IDS), r"expected \[B, 1\].*found \[4\]"),
    (lambda bags: JaggedTensor(IDS), "give lengths or offsets; found neither"),
    (lambda bags: JaggedTensor(IDS, lengths=torch.tensor([3])), "add up to 3 ids, values holds 4"),
], ids=["split", "permute twice", "permute outside", "concat nothing", "concat weights",
        "from_dense", "jagged sizes", "jagged sum"])
def test_parts_refuse(call, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call(ragged())
