"""Several tensor trains in one call: what one train at a time gives."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.registry import has_triton
from shardlab.ops.tensor_train import (
    Workspace,
    tensor_train_gradients_reference,
    tensor_train_rows_reference,
)
from shardlab.ops.tensor_train_batch import all_slices, batch_gradients, batch_rows
from tests.shardlab.ops.test_tensor_train import make, some_ids

FACES = ["native", "reference", *(["triton"] if has_triton() else [])]


@pytest.fixture(params=FACES)
def face(request, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", request.param)
    return request.param


def build():
    """Trains of 2, 3 and 4 cores and odd sizes; the second one has no ids."""
    trains = [make(100, 13, 5, 2), make(50, 4, 3), make(997, 12, 6, 3, seed=1), make(1, 1, 1, 2),
              make(300, 8, 3, 4, seed=2)]
    ids = [some_ids(100, 6), torch.empty(0, dtype=torch.int64), some_ids(997, 9, seed=1),
           torch.tensor([0]), some_ids(300, 5)]
    edges = [0]
    for one in ids:
        edges.append(edges[-1] + one.numel())
    return trains, ids, edges


def test_rows_and_gradients_equal_those_of_each_train(face):
    trains, ids, edges = build()
    columns = [13, 4, 12, 1, 8]
    sizes = [len(one) * width for one, width in zip(ids, columns, strict=True)]
    out, workspace = torch.full((sum(sizes),), torch.nan), Workspace()
    batch_rows(trains, torch.cat(ids), edges, out, workspace)
    grads = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(3))
    order = [(4, 3), (0, 0), (2, 1), (1, 0), (2, 0), (3, 1), (4, 1), (0, 1), (1, 2), (4, 0), (2, 2),
             (3, 0), (1, 1), (4, 2)]
    every = [True, True, False, False, False]
    found = batch_gradients(trains, torch.cat(ids), edges, grads, order, every, workspace)
    wanted = []
    for train, one, rows, given, width in zip(trains, ids, out.split(sizes), grads.split(sizes),
                                              columns, strict=True):
        torch.testing.assert_close(rows.view(-1, width), tensor_train_rows_reference(train, one))
        wanted.append(tensor_train_gradients_reference(train, one, given.view(-1, width)))
    assert found.splits.tolist()[-1] == found.ids.numel() == found.sources.numel()
    for place, (number, core) in enumerate(order):
        touched, values = wanted[number].touched[core], wanted[number].grads[core]
        if every[number] and len(ids[number]):
            touched, values = all_slices(trains[number].cores[core].shape[0], touched, values)
        mine, grads_found = found.core(place, trains[number].cores[core].shape[1])
        assert torch.equal(mine, touched)
        torch.testing.assert_close(grads_found, values, rtol=1e-5, atol=1e-5)


def test_a_batch_may_shrink_and_grow(face):
    """What an earlier call left behind is not seen."""
    workspace = Workspace()
    for count in (4, 1, 30, 2):
        train, ids = make(997, 12, 17), some_ids(997, count, seed=count)
        out = torch.empty(ids.numel() * 12)
        if face == "triton":
            train = make(997, 12, 3)
        batch_rows([train], ids, [0, ids.numel()], out, workspace)
        torch.testing.assert_close(out.view(-1, 12), tensor_train_rows_reference(train, ids),
                                   rtol=1e-4, atol=1e-4)


def test_every_core_must_be_listed(monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", "native")
    train, workspace, ids = make(100, 12, 5), Workspace(), torch.tensor([1])
    out = torch.empty(12)
    batch_rows([train], ids, [0, 1], out, workspace)
    with pytest.raises(ValueError, match="order: core 1 of train 0 is missing; list every core"):
        batch_gradients([train], ids, [0, 1], out, [(0, 0), (0, 2)], [False], workspace)


def test_wrong_dtypes_are_refused():
    train, workspace = make(100, 12, 5), Workspace()
    with pytest.raises(TypeError, match=r"out: expected a contiguous torch.float32"):
        batch_rows([train], torch.tensor([1]), [0, 1], torch.empty(12, dtype=torch.float64),
                   workspace)
    with pytest.raises(TypeError, match=r"grads: expected a contiguous torch.float32"):
        batch_gradients([train], torch.tensor([1]), [0, 1], torch.empty(12).double(), [(0, 0)],
                        [False], workspace)
