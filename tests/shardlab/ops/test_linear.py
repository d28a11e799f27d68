"""Fully connected layer with a ReLU: the native face against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlab.errors import InputError
from shardlab.ops import linear, registry
from shardlab.ops.linear import linear_relu, linear_relu_reference
from shardlab.ops.registry import face_of

# Sums of up to 1100 products of magnitude 1 in another order, relative to the largest element.
RELATIVE = 1e-5

# (batch, inputs, outputs): tiles and packs have sizes 8, 16, 64, 256 and 512, so cross each; fewer
# outputs than 8 are summed without tiles.
SHAPES = [(1, 1, 8), (7, 13, 17), (33, 16, 64), (64, 100, 65), (9, 530, 24), (270, 9, 530),
          (1030, 5, 9), (0, 5, 30), (1, 1, 1), (300, 1100, 1), (65, 47, 3), (9, 64, 7), (0, 20, 1)]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDLAB_FACE", "native")
    if face_of("linear_relu", "cpu") != "native":
        pytest.skip("no native face here")


@pytest.fixture(params=["bf16 products", "fp32 products"])
def native_bf16(native: None, monkeypatch: pytest.MonkeyPatch,
                request: pytest.FixtureRequest) -> None:
    if request.param == "fp32 products":  # of rounded operands, as on processors without the other
        monkeypatch.setattr(linear, "_has_bf16_products", lambda: False)
    elif not registry.native().has_bf16_products():
        pytest.skip("this processor has no bf16 products")


def make(batch: int, inputs: int, outputs: int) -> list[Tensor]:
    shapes = [(batch, inputs), (outputs, inputs), (outputs,)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0.0, atol=RELATIVE * scale)


def assert_within_bf16(actual: Tensor, expected: Tensor) -> None:
    """Rounding to 8 bits is off by up to 2^-8 of the value; the sum before it by RELATIVE."""
    assert actual.dtype == torch.bfloat16
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=RELATIVE * scale)


def run(op, inputs: list[Tensor], relu: bool, grad: Tensor) -> list[Tensor]:
    """Output, then the gradients of x, weight and bias."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*inputs, relu)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), SHAPES)
def test_native_equals_reference(native: None, batch: int, inputs: int, outputs: int,
                                 relu: bool) -> None:
    tensors, grad = make(batch, inputs, outputs), torch.randn(batch, outputs)
    ours = run(linear_relu, tensors, relu, grad)
    exact = run(linear_relu_reference, [x.double() for x in tensors], relu, grad)
    for actual, expected in zip(ours, exact, strict=True):
        assert_close(actual, expected)


def test_gradcheck_of_reference() -> None:
    inputs = [x.detach().double().requires_grad_() for x in make(4, 5, 3)]
    assert torch.autograd.gradcheck(linear_relu_reference, inputs)


def test_rows_with_a_stride_and_a_gradient_that_is_expanded(native: None) -> None:
    _, weight, bias = make(20, 24, 40)
    wide = torch.randn(20, 30, requires_grad=True)
    linear_relu(wide[:, 3:27], weight, bias).sum().backward()
    ours = [wide.grad, weight.grad, bias.grad]
    wide.grad = weight.grad = bias.grad = None
    linear_relu_reference(wide[:, 3:27], weight, bias).sum().backward()
    for actual, expected in zip(ours, (wide.grad, weight.grad, bias.grad), strict=True):
        assert_close(actual, expected)


def test_the_gradient_that_comes_in_is_left_alone(native: None) -> None:
    x, weight, bias = make(6, 10, 16)
    first, second = (linear_relu(x, weight, bias), linear_relu(-x, weight, bias))
    (first + second).sum().backward()  # addition hands both branches one and the same gradient
    actual = x.grad.clone()
    x.grad = None
    (linear_relu_reference(x, weight, bias) + linear_relu_reference(-x, weight, bias)) \
        .sum().backward()
    assert_close(actual, x.grad)


@pytest.mark.parametrize("wanted", [(False, True, True), (True, False, False),
                                    (False, False, True), (False, True, False)],
                         ids=["weights", "input", "bias", "weight"])
def test_only_what_is_wanted_gets_a_gradient(native: None, wanted: tuple[bool, ...]) -> None:
    inputs = [x.detach().requires_grad_(want)
              for x, want in zip(make(12, 9, 20), wanted, strict=True)]
    linear_relu(*inputs).square().sum().backward()
    ours = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    linear_relu_reference(*inputs).square().sum().backward()
    for actual, x in zip(ours, inputs, strict=True):
        assert (actual is None) == (x.grad is None)
        if actual is not None:
            assert_close(actual, x.grad)


def test_without_bias(native: None) -> None:
    x, weight, _ = make(5, 6, 32)
    assert_close(linear_relu(x, weight, None), linear_relu_reference(x, weight, None))


def test_nan_is_not_hidden_by_the_relu(native: None) -> None:
    x, weight, bias = make(3, 4, 16)
    with torch.no_grad():
        x[1, 2] = torch.nan
    out = linear_relu(x, weight, bias)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("outputs", [90, 2])
def test_threads_do_not_change_a_bit(native: None, outputs: int) -> None:
    tensors, grad = make(300, 70, outputs), torch.randn(300, outputs)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(linear_relu, tensors, True, grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autocast_computes_and_returns_bf16(native: None) -> None:
    x, weight, bias = make(6, 10, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_relu(x, weight, bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def rounded(x: Tensor) -> Tensor:
    """What a bf16 product sees, in fp64."""
    return x.detach().bfloat16().double()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x=fp32", "x=bf16"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), SHAPES)
def test_native_bf16_rounds_operands_and_sums_in_fp32(
        native_bf16: None, batch: int, inputs: int, outputs: int, relu: bool,
        x_dtype: torch.dtype) -> None:
    x, weight, bias = make(batch, inputs, outputs)
    x = x.detach().to(x_dtype).requires_grad_()
    grad = torch.randn(batch, outputs).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_relu(x, weight, bias, relu)
    out.backward(grad)
    exact = rounded(x) @ rounded(weight).t() + bias.detach().double()
    assert_within_bf16(out, exact.relu() if relu else exact)
    masked = torch.where(out <= 0, 0.0, grad.double()) if relu else grad.double()
    if x_dtype == torch.bfloat16:
        assert_within_bf16(x.grad, masked @ rounded(weight))
    else:
        assert_close(x.grad, masked @ rounded(weight))
    assert_close(weight.grad, masked.t() @ rounded(x))
    assert_close(bias.grad, masked.sum(0))


def test_native_bf16_threads_do_not_change_a_bit(native_bf16: None) -> None:
    tensors, grad = make(300, 70, 90), torch.randn(300, 90)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(run(linear_relu, tensors, True, grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("x", "weight", "bias"), [((3, 4), (5, 6), (5,)), ((3, 6), (5, 6), (6,))],
                         ids=["columns", "bias"])
def test_shapes_that_do_not_fit(x: tuple[int, ...], weight: tuple[int, ...],
                                bias: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"weight \[5, 6\] needs x \[B, 6\] and bias \[5\], found"):
        linear_relu(torch.zeros(x), torch.zeros(weight), torch.zeros(bias))
