"""The oracle against torch's own optimisers and layers, where torch has them."""

from __future__ import annotations

import pytest
import torch

from shardlab.specs import EmbeddingBagConfig
from tests.oracle import Bags, Oracle, PlainOptimizer, flat, join, split

ROWS, DIM, SAMPLES = 11, 3, 6


def _table(**changes):
    fields = {"num_embeddings": ROWS, "embedding_dim": DIM, "name": "t", "feature_names": ("f",)}
    return EmbeddingBagConfig(**(fields | changes))


def _bags(generator, low=0, high=ROWS, weighted=False):
    lengths = torch.randint(0, 4, (SAMPLES,), generator=generator).tolist()
    ids = [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]
    weights = [torch.rand(n, generator=generator).tolist() for n in lengths]
    return Bags(ids, weights if weighted else None)


def _train(oracle, batches, target):
    for bags in batches:
        (oracle.forward({"f": bags})["f"] - target).square().mean().backward()
        oracle.step()


def _torch_weights(optimizer, weight, batches, target, mode="sum", **options):
    """The same steps with nn.EmbeddingBag(sparse) under a torch optimiser."""
    bag = torch.nn.EmbeddingBag(ROWS, DIM, mode=mode, sparse=optimizer is torch.optim.SparseAdam,
                                dtype=torch.float64)
    bag.weight.data.copy_(weight)
    optimizer = optimizer(bag.parameters(), lr=0.1, **options)
    for bags in batches:
        values, lengths, _ = flat({"f": bags}, ["f"])
        offsets = torch.cumsum(lengths, 0) - lengths
        optimizer.zero_grad()
        (bag(values, offsets) - target).square().mean().backward()
        optimizer.step()
    return bag.weight.detach()


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize(("kind", "torch_optimizer", "eps"), [
    ("sgd", torch.optim.SGD, 0.0), ("adagrad", torch.optim.Adagrad, 1e-10)],
    ids=["sgd", "adagrad"])
def test_five_steps_equal_torch(kind, torch_optimizer, eps, pooling, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [_bags(generator) for _ in range(5)]
    weight = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    target = torch.randn(SAMPLES, DIM, generator=generator, dtype=torch.float64)
    oracle = Oracle([_table(pooling=pooling)], {"t": weight}, PlainOptimizer(kind, 0.1, eps=eps))
    _train(oracle, batches, target)
    expected = _torch_weights(torch_optimizer, weight, batches, target, pooling)
    torch.testing.assert_close(oracle.rows("t"), expected, rtol=1e-12, atol=1e-13)


def test_adam_equals_torch_sparse_adam(seed):
    eps = 1e-14  # SparseAdam adds eps before the bias correction, Adam after it
    generator = torch.Generator().manual_seed(seed)
    batches = [_bags(generator) for _ in range(5)]
    weight = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    target = torch.randn(SAMPLES, DIM, generator=generator, dtype=torch.float64)
    oracle = Oracle([_table()], {"t": weight}, PlainOptimizer("adam", 0.1, eps=eps))
    _train(oracle, batches, target)
    expected = _torch_weights(torch.optim.SparseAdam, weight, batches, target, eps=eps)
    torch.testing.assert_close(oracle.rows("t"), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("kind", "like"), [("row_wise_adagrad", "adagrad"),
                                            ("row_wise_adam", "adam")])
def test_row_wise_kinds_equal_the_full_ones_at_width_one(kind, like, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [_bags(generator) for _ in range(5)]
    weight = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
    oracles = [Oracle([_table(embedding_dim=1)], {"t": weight}, PlainOptimizer(each, 0.1))
               for each in (kind, like)]
    for oracle in oracles:
        _train(oracle, batches, torch.ones(SAMPLES, 1, dtype=torch.float64))
    assert torch.equal(oracles[0].rows("t"), oracles[1].rows("t"))


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "row_wise_adagrad", "adam", "row_wise_adam"])
def test_rows_that_do_not_occur_are_untouched(kind):
    weight = torch.ones(ROWS, DIM, dtype=torch.float64)
    oracle = Oracle([_table()], {"t": weight}, PlainOptimizer(kind, 0.1, weight_decay=0.1))
    for ids in ([[2], [3, 3]], [[2]]):
        oracle.forward({"f": Bags(ids)})["f"].sum().backward()
        oracle.step()
    changed = (oracle.rows("t") != 1).any(dim=1).nonzero().flatten().tolist()
    assert changed == [2, 3]
    for state in oracle.state["t"].values():
        assert state.reshape(ROWS, -1).any(dim=1).nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize(("bounds", "expected", "touched"), [
    ("clamp_to_zero", [(5.0 + 1.0) / 2, 1.0], [0, 4]), ("ignore", [5.0 / 2, 0.0], [4])])
def test_ids_outside_the_table_follow_the_bounds_mode(bounds, expected, touched):
    table = _table(embedding_dim=1, bounds=bounds, pooling="mean")
    weight = torch.arange(1.0, ROWS + 1)[:, None]
    oracle = Oracle([table], {"t": weight}, PlainOptimizer("sgd"))
    out = oracle.forward({"f": Bags([[4, ROWS], [-1]])})["f"]
    assert out.flatten().tolist() == expected
    assert oracle.touched["t"].tolist() == touched


def test_clipping_equals_torch_on_the_summed_gradients():
    weight = torch.zeros(ROWS, DIM, dtype=torch.float64)
    tables = [_table(), _table(name="u", feature_names=("g",))]
    optimizer = PlainOptimizer("sgd", lr=1.0, clip_value=1.5, clip_norm=4.0)
    oracle = Oracle(tables, {"t": weight, "u": weight}, optimizer)
    out = oracle.forward({"f": Bags([[1, 1, 2], [1]]), "g": Bags([[5], []])})
    (out["f"].sum() + out["g"].sum()).backward()
    oracle.step()
    parameters = [torch.nn.Parameter(torch.zeros(ROWS, DIM)) for _ in "tu"]
    for parameter in parameters:
        parameter.grad = torch.zeros(ROWS, DIM)
    # Row 1 occurs three times. The norm, sqrt(3 * (9 + 1 + 1)), leaves it above the value's bound.
    parameters[0].grad[1], parameters[0].grad[2], parameters[1].grad[5] = 3.0, 1.0, 1.0
    torch.nn.utils.clip_grad_norm_(parameters, 4.0)
    assert parameters[0].grad.max() > 1.5
    torch.nn.utils.clip_grad_value_(parameters, 1.5)
    for name, parameter in zip("tu", parameters, strict=True):
        torch.testing.assert_close(oracle.rows(name).float(), -parameter.grad)


def test_split_then_join_gives_the_batch_back(seed):
    batch = {"f": _bags(torch.Generator().manual_seed(seed), weighted=True)}
    parts = split(batch, [2, 0, 3, 1])
    assert [len(part["f"]) for part in parts] == [2, 0, 3, 1]
    assert join(parts) == batch
