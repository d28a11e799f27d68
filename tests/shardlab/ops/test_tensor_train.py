"""Tensor-train rows and gradients: every face against the table in fp64."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.ops.registry import has_triton
from shardlab.ops.tensor_train import (
    logical_cores,
    materialise,
    tensor_train_gradients,
    tensor_train_gradients_reference,
    tensor_train_rows,
    tensor_train_rows_reference,
)
from shardlab.ops.tensor_train_types import (
    CoreGradients,
    TensorTrain,
    Workspace,
    train_numbers,
    train_of,
)
from shardlab.tensor_train_shapes import TensorTrainShape, tensor_train_shape
from tests.tensor_train_oracle import whole_table

FACES = ["native", "reference", *(["triton"] if has_triton() else [])]
#: rows, columns, rank, cores: odd sizes, ranks beyond and below a register, 2 to 4 cores.
SHAPES = [(1, 1, 1, 2), (100, 15, 17, 3), (997, 64, 33, 3), (5000, 13, 5, 2), (777, 60, 7, 4),
          (300, 24, 40, 3)]


@pytest.fixture(params=FACES)
def face(request, monkeypatch):
    """Every face; Triton's runs in its interpreter, where there is no GPU."""
    monkeypatch.setenv("SHARDLAB_FACE", request.param)
    return request.param


def make(rows, columns, rank, cores=3, *, dtype=torch.float32, seed=0, **factors):
    shape = tensor_train_shape(rows, columns, rank, cores, **factors)
    generator = torch.Generator().manual_seed(seed)
    return TensorTrain(shape, tuple(
        torch.randn(p, a * q * b, generator=generator, dtype=torch.float64).to(dtype) / b**0.5
        for a, p, q, b in shape.core_shapes))


def some_ids(rows, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows, (count,), generator=generator)
    return torch.unique(torch.cat([ids, torch.tensor([0, rows - 1])]))


def doubled(train):
    return TensorTrain(train.shape, tuple(core.double() for core in train.cores))


def by_autograd(train, ids, grads):
    """Gradients of the cores through the whole table, fp64, dense."""
    cores = [core.double().requires_grad_() for core in train.cores]
    table = whole_table(logical_cores(TensorTrain(train.shape, tuple(cores))))
    return torch.autograd.grad(table[ids], cores, grads.double())


def assert_gradients(found: CoreGradients, wanted):
    for touched, grads, dense in zip(found.touched, found.grads, wanted, strict=True):
        assert torch.equal(touched, dense.abs().sum(1).nonzero()[:, 0])
        scale = float(dense.abs().max())
        torch.testing.assert_close(grads.double(), dense[touched], rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_gradients_equal_the_table(face, shape):
    if face == "triton":  # the interpreter takes milliseconds for every product
        shape = (shape[0], min(shape[1], 15), min(shape[2], 6), shape[3])
    train, ids = make(*shape), some_ids(shape[0], 4 if face == "triton" else 30)
    out, workspace = torch.full((ids.numel(), shape[1]), torch.nan), Workspace()
    tensor_train_rows(train, ids, out, workspace)
    wanted = whole_table(logical_cores(doubled(train)))[ids]
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    grads = torch.randn(ids.numel(), shape[1], generator=torch.Generator().manual_seed(1))
    for products in (True, False):
        found = tensor_train_gradients(train, ids, grads, workspace, products=products)
        assert_gradients(found, by_autograd(train, ids, grads))


def test_no_ids(face):
    train, workspace = make(100, 8, 4), Workspace()
    empty = torch.empty(0, dtype=torch.int64)
    tensor_train_rows(train, empty, torch.empty(0, 8), workspace)
    found = tensor_train_gradients(train, empty, torch.empty(0, 8), workspace, products=False)
    assert [touched.numel() for touched in found.touched] == [0, 0, 0]
    assert [grads.numel() for grads in found.grads] == [0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(factors=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=2, max_size=4),
       ranks=st.lists(st.integers(1, 20), min_size=3, max_size=3), count=st.integers(1, 60),
       seed=st.integers(0, 99))
def test_native_equals_the_reference(factors, ranks, count, seed):
    rows = [p for p, _ in factors]
    shape = TensorTrainShape(math.prod(rows), tuple(rows), tuple(q for _, q in factors),
                             (1, *ranks[:len(factors) - 1], 1))
    generator = torch.Generator().manual_seed(seed)
    train = TensorTrain(shape, tuple(torch.randn(p, a * q * b, generator=generator)
                                     for a, p, q, b in shape.core_shapes))
    ids, workspace = some_ids(shape.rows, count, seed), Workspace()
    out = torch.empty(ids.numel(), shape.columns)
    tensor_train_rows(train, ids, out, workspace)
    wanted = tensor_train_rows_reference(doubled(train), ids)
    torch.testing.assert_close(out.double(), wanted, rtol=0,
                               atol=1e-5 * float(wanted.abs().max()))
    grads = torch.randn(ids.numel(), shape.columns, generator=generator)
    found = tensor_train_gradients(train, ids, grads, workspace, products=True)
    exact = tensor_train_gradients_reference(doubled(train), ids, grads.double())
    for a, b, x, y in zip(found.touched, exact.touched, found.grads, exact.grads, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5 * float(y.abs().max()))


def test_gradcheck_of_the_reference():
    train, ids = make(60, 12, 3, dtype=torch.float64), torch.tensor([0, 5, 6, 31, 59])

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *cores):
            return tensor_train_rows_reference(TensorTrain(train.shape, cores), ids)

        @staticmethod
        def backward(ctx, grads):
            found = tensor_train_gradients_reference(train, ids, grads.contiguous())
            return tuple(torch.zeros_like(core).index_copy(0, touched, values)
                         for core, touched, values in zip(train.cores, found.touched, found.grads,
                                                          strict=True))

    cores = tuple(core.clone().requires_grad_() for core in train.cores)
    assert torch.autograd.gradcheck(Rows.apply, cores)


@pytest.mark.parametrize("rank", [32, 33])
def test_same_bits_for_any_number_of_threads(rank):
    train, ids = make(200_000, 16, rank), some_ids(200_000, 3000)
    grads = torch.randn(ids.numel(), 16, generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, workspace = torch.empty(ids.numel(), 16), Workspace()
            tensor_train_rows(train, ids, out, workspace)
            found = tensor_train_gradients(train, ids, grads, workspace, products=True)
            results.append([out, *(values.clone() for values in found.grads)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_ids_up_to_two_to_the_forty():
    rows = 2**40
    train = make(rows, 8, 2, 4)
    ids = torch.tensor([0, 12345678901, rows - 2, rows - 1])
    out = torch.empty(4, 8)
    tensor_train_rows(train, ids, out, Workspace())
    p = train.shape.row_factors
    for row, value in zip(ids.tolist(), out, strict=True):
        product = torch.ones(1, 1, dtype=torch.float64)
        for k, core in enumerate(logical_cores(doubled(train))):
            digit = row // math.prod(p[k + 1:]) % p[k]
            product = torch.einsum("ar,rqs->aqs", product, core[digit]).flatten(0, 1)
        torch.testing.assert_close(value.double(), product[:, 0], rtol=1e-5, atol=1e-6)


def test_numbers_and_tensors_name_a_train():
    train = make(100, 12, 5)
    tensors = {f"core{number}": core for number, core in enumerate(train.cores)}
    again = train_of(train_numbers(train.shape), tensors)
    ids = [99, 3, 3, 0]
    assert torch.equal(materialise(again, ids), materialise(train, ids))
    assert materialise(train, ids).shape == (4, 12)


@pytest.mark.parametrize(("change", "text"), [
    ({"ids": torch.tensor([1, 2], dtype=torch.int32)}, "ids: expected a contiguous torch.int64"),
    ({"out": torch.empty(2, 13)}, r"rows: expected \[2, 12\], found \(2, 13\)"),
    ({"core": torch.empty(5, 7)}, "core 0: expected 4 slices of")], ids=["ids", "rows", "core"])
def test_wrong_arguments_are_refused(change, text):
    train = make(100, 12, 5)
    if "core" in change:
        train = TensorTrain(train.shape, (change["core"], *train.cores[1:]))
    with pytest.raises(TypeError, match=text):
        tensor_train_rows(train, change.get("ids", torch.tensor([1, 2])),
                          change.get("out", torch.empty(2, 12)), Workspace())


def test_triton_runs_in_the_interpreter_without_a_gpu():
    """What the faces above need to mean anything in CI."""
    assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
