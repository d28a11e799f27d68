"""Every accepted form of a batch gives the same result; every wrong one names what is wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import shardlab as sl
from shardlab.errors import BoundsError, InputError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from tests.harness import RankError, run_ranks
from tests.oracle import Bags, PlainOptimizer
from tests.sharded_runs import (
    Bare,
    Job,
    Step,
    assert_equals_oracle,
    random_steps,
    random_weights,
    table_plan,
    train,
)

USER = EmbeddingBagConfig(num_embeddings=10, embedding_dim=3, name="t_user", pooling="mean",
                          feature_names=("user", "friend"))
ITEM = EmbeddingBagConfig(num_embeddings=7, embedding_dim=5, name="t_item",
                          feature_names=("item",))
TABLES = (USER, ITEM)
NAMES = ["user", "friend", "item"]


def _model(exchange="rows", groups=None, tables=TABLES):
    world = 1 if groups is None else groups.world_size
    tables = [dataclasses.replace(table, exchange=exchange) for table in tables]
    plan = ShardingPlan(world, tuple(table_plan(table, ShardingType.ROW_WISE, world,
                                                exchange=table.exchange) for table in tables))
    return sl.shard(Bare(tables), plan, groups=groups, optimizer=sl.optim.SGD(lr=0.5))


def _step(features, exchange="rows"):
    """Output and the rows after one step, on one rank."""
    model, optimizer = _model(exchange)
    out = model(features).values()
    out.square().sum().backward()
    optimizer.step()
    rows = [chunk.weights for chunk in model.collections()["ebc"].chunks()]
    return [out.detach(), *rows]


class Duck:
    """Looks like another library's KeyedJaggedTensor."""

    def __init__(self, keys, values, lengths, weights=None):
        self._parts = (keys, values, lengths, weights)

    def keys(self):
        return self._parts[0]

    def values(self):
        return self._parts[1]

    def lengths(self):
        return self._parts[2]

    def weights_or_none(self):
        return self._parts[3]


VALUES = [torch.tensor([1, 9, 9, 0]), torch.tensor([4]), torch.tensor([6, 6, 2, 0, 1])]
LENGTHS = [torch.tensor([3, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([2, 1, 2])]
WEIGHTS = [torch.tensor([0.5, 2, 1, 1]), torch.tensor([3.0]), torch.tensor([1, 0.25, 1, 1, 4])]


def _parts(order, weighted=False):
    picked = [torch.cat([parts[i] for i in order]) for parts in (VALUES, LENGTHS, WEIGHTS)]
    return [NAMES[i] for i in order], *picked[:2], picked[2] if weighted else None


def _kjt(order, weighted=False):
    keys, values, lengths, weights = _parts(order, weighted)
    return sl.KeyedJaggedTensor(keys, values, weights, lengths=lengths)


FORMS = {
    "kjt": _kjt,
    "kjt-offsets": lambda order, weighted: sl.KeyedJaggedTensor(
        _parts(order)[0], _parts(order)[1], _parts(order, weighted)[3],
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), _parts(order)[2].cumsum(0)])),
    "duck": lambda order, weighted: Duck(*_parts(order, weighted)),
    "int32": lambda order, weighted: Duck(_parts(order)[0], _parts(order)[1].int(),
                                          _parts(order)[2].int(), _parts(order, weighted)[3]),
    "uint8-fp64": lambda order, weighted: Duck(
        _parts(order)[0], _parts(order)[1].byte(), _parts(order)[2],
        _parts(order)[3] if not weighted else _parts(order, True)[3].double()),
    "dict": lambda order, weighted: {
        NAMES[i]: (VALUES[i], LENGTHS[i], *([WEIGHTS[i]] if weighted else [])) for i in order},
    "dict-numpy": lambda order, weighted: {
        NAMES[i]: tuple(part.numpy() for part in (
            VALUES[i], LENGTHS[i], *([WEIGHTS[i]] if weighted else []))) for i in order},
    "dict-jagged": lambda order, weighted: {
        NAMES[i]: sl.JaggedTensor(VALUES[i], WEIGHTS[i] if weighted else None,
                                  lengths=LENGTHS[i]) for i in order},
}


@pytest.mark.parametrize("exchange", ["rows", "pooled"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_alike(form, order, weighted, exchange):
    expected = _step(_kjt([0, 1, 2], weighted), exchange)
    found = _step(FORMS[form](order, weighted), exchange)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("exchange", ["rows", "pooled"])
@pytest.mark.parametrize("form", [
    lambda ids: ids, lambda ids: ids.numpy(), lambda ids: ids.int(),
    lambda ids: ids.numpy().astype(np.int16),
    lambda ids: sl.KeyedJaggedTensor.from_dense(NAMES, ids),
    lambda ids: sl.KeyedJaggedTensor.from_dense(NAMES[::-1], ids.flip(1)),
], ids=["tensor", "numpy", "int32", "numpy-int16", "from_dense", "from_dense-permuted"])
def test_dense_matrix_trains_like_bags_of_one(form, exchange):
    ids = torch.tensor([[1, 9, 6], [1, 0, 0], [5, 1, 6], [9, 9, 3]])
    plain = sl.KeyedJaggedTensor(NAMES, ids.t().reshape(-1),
                                 lengths=torch.ones(12, dtype=torch.int64))
    assert all(map(torch.equal, _step(form(ids), exchange), _step(plain, exchange)))


def test_output_keeps_the_order_of_the_tables():
    out = _model()[0](_kjt([2, 1, 0]))
    assert out.keys() == NAMES
    assert out.length_per_key() == [3, 3, 5]
    assert torch.equal(out["item"], out.values()[:, 6:])


def _without(*names):
    return {name: (VALUES[i], LENGTHS[i]) for i, name in enumerate(NAMES) if name not in names}


FLOAT = {**_without("item"), "item": (VALUES[2].float(), LENGTHS[2])}

WRONG = {
    "missing": (lambda: _without("friend"),
                ["feature 'friend'", "table 't_user'", "is missing"]),
    "unknown": (lambda: {**_without(), "zebra": (VALUES[1], LENGTHS[1])},
                ["feature 'zebra' is unknown", "'user', 'friend', 'item'"]),
    "misspelt": (lambda: {**_without("user"), "usre": (VALUES[0], LENGTHS[0])},
                 ["feature 'usre' is unknown (did you mean 'user'?)",
                  "feature 'user' of table 't_user' is missing"]),
    "float ids": (lambda: FLOAT, ["feature 'item'", "integers", "torch.float32"]),
    "float ids of a kjt": (lambda: Duck(["item", "user", "friend"], torch.ones(3),
                                        torch.ones(3, dtype=torch.int64)),
                           ["item", "integers", "torch.float32"]),
    "float matrix": (lambda: torch.ones(2, 3), ["integers", "torch.float32"]),
    "narrow matrix": (lambda: torch.ones(2, 2, dtype=torch.int64),
                      ["[B, 3]", "[user, friend, item]", "[2, 2]"]),
    "batch sizes": (lambda: {**_without("item"), "item": (VALUES[1], LENGTHS[1][:2])},
                    ["feature 'item'", "batch of 2", "batch of 3"]),
    "short values": (lambda: {**_without("item"), "item": (VALUES[2][:4], LENGTHS[2])},
                     ["feature 'item'", "5 ids", "holds 4"]),
    "negative length": (lambda: Duck(*_parts([0, 1, 2])[:2], torch.tensor(
        [3, 0, 1, 0, 1, 0, 6, -1, 0])), ["feature 'item'", "sample 1", "length -1"]),
    "weights": (lambda: Duck(*_parts([0, 1, 2])[:3], torch.ones(3)), ["3 found for 10 ids"]),
    "weights with gradient": (
        lambda: Duck(*_parts([0, 1, 2])[:3], torch.ones(10, requires_grad=True)),
        ["per-sample weights require a gradient", "weights.detach()"]),
    "twice": (lambda: Duck(["user", "user", "item"], *_parts([0, 1, 2])[1:]),
              ["['user'] more than once"]),
    "list": (lambda: [VALUES[0]], ["expected a KeyedJaggedTensor", "found list"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_named_with_its_rank(kind):
    features, words = WRONG[kind]
    model, _ = _model()
    with pytest.raises(InputError) as caught:
        model(features())
    for word in [*words, "rank 0"]:
        assert word in str(caught.value), (word, str(caught.value))
    model(_kjt([0, 1, 2])).values().sum().backward()  # the model is still sound


OUTSIDE = [("friend", 10, USER), ("friend", -1, USER), ("item", 7, ITEM),
           ("item", 2 ** 40, ITEM), ("user", -(2 ** 62), USER)]


def _batch_with(feature, value):
    """Sample 2 holds the wrong id, behind a right one."""
    bags = {name: [[1, 2], [], [0], [3]] for name in NAMES}
    bags[feature] = [[1, 2], [], [0, value], [3]]
    return {name: (torch.tensor([row for bag in rows for row in bag]),
                   torch.tensor([len(bag) for bag in rows])) for name, rows in bags.items()}


def _text(feature, value, table, rank, row):
    return (f"feature '{feature}', table '{table.name}', rank {rank}, row {row} of the batch: id "
            f"{value} is outside [0, {table.num_embeddings})")


@pytest.mark.parametrize("exchange", ["rows", "pooled"])
@pytest.mark.parametrize(("feature", "value", "table"), OUTSIDE, ids=str)
def test_id_outside_its_table_is_named(feature, value, table, exchange):
    model, _ = _model(exchange)
    with pytest.raises(BoundsError) as caught:
        model(_batch_with(feature, value))
    assert _text(feature, value, table, 0, 2) in str(caught.value)
    model(_kjt([0, 1, 2])).values().sum().backward()


@pytest.mark.parametrize("exchange", ["rows", "pooled"])
def test_id_outside_its_table_is_named_in_a_dense_matrix(exchange):
    ids = torch.tensor([[1, 9, 6], [1, 0, 0], [5, 10, 6]])
    with pytest.raises(BoundsError) as caught:
        _model(exchange)[0](ids)
    assert _text("friend", 10, USER, 0, 2) in str(caught.value)


def _wrong_on_rank_1(groups, exchange):
    model, _ = _model(exchange, groups)
    model(_batch_with("friend", 10 if groups.rank == 1 else 9))


@pytest.mark.parametrize("exchange", ["rows", "pooled"])
def test_id_outside_its_table_names_its_rank(exchange):
    with pytest.raises(RankError) as caught:
        run_ranks(2, _wrong_on_rank_1, exchange)
    assert str(caught.value).startswith("rank 1 failed in _wrong_on_rank_1")
    assert _text("friend", 10, USER, 1, 2) in str(caught.value)


@pytest.mark.parametrize("dense", [False, True], ids=["bags", "one id each"])
@pytest.mark.parametrize("world", [1, 2], ids="ranks_{}".format)
@pytest.mark.parametrize("bounds", ["clamp_to_zero", "ignore"])
def test_bounds_modes_equal_oracle(bounds, world, dense, seed):
    generator = torch.Generator().manual_seed(seed)
    tables = [dataclasses.replace(table, name=f"{table.name}_{exchange.value}", bounds=bounds,
                                  exchange=exchange, feature_names=[
                                      f"{name}_{exchange.value}" for name in table.feature_names])
              for table in TABLES for exchange in (ExchangeKind.ROWS, ExchangeKind.POOLED)]
    plan = ShardingPlan(world, tuple(table_plan(table, ShardingType.ROW_WISE, world,
                                                exchange=table.exchange) for table in tables))
    steps = random_steps(tables, [[4] * world] * 5, generator=generator, weighted=not dense)
    steps = [_spoil(step, dense) for step in steps]
    job = Job(tuple(tables), plan, PlainOptimizer("adagrad", lr=0.1),
              random_weights(tables, generator), steps)
    assert_equals_oracle(job, [run for run, in run_ranks(world, train, [job])])


def _spoil(step: Step, dense: bool) -> Step:
    """Puts ids outside the table into some bags; sample 1 holds nothing else."""
    def bags(feature: str, found: Bags) -> Bags:
        ids = [[3] for _ in found.ids] if dense else [list(bag) for bag in found.ids]
        outside = [-1, 10 ** 9, 10]
        for number, bag in enumerate(ids):
            for place in range(len(bag)):
                if number == 1 or (number + place + len(feature)) % 3 == 0:
                    bag[place] = outside[place % 3]
        return Bags(ids, None if dense else found.weights)

    return dataclasses.replace(step, parts=[
        {feature: bags(feature, found) for feature, found in part.items()}
        for part in step.parts])
