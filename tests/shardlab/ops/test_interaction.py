"""Dot interaction: formula, gradients, and every face against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlab.errors import InputError
from shardlab.ops.interaction import (
    dot_interaction,
    dot_interaction_reference,
    interaction_width,
)
from shardlab.ops.registry import face_of

# Sums of D products of magnitude 1 in another order: 1e-5 of the largest element.
RELATIVE = 1e-5

SHAPES = [(5, 26, 16), (3, 26, 64), (4, 1, 7), (1, 1, 1), (0, 3, 4), (2, 40, 13), (3, 8, 100),
          (1, 17, 16), (3, 30, 8), (2, 31, 16)]


@pytest.fixture(params=["reference", "native", "triton"])
def face(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHARDLAB_FACE", request.param)
    if face_of("dot_interaction", "cpu") != request.param:
        pytest.skip(f"no {request.param} face here")
    return request.param


def make(batch: int, features: int, columns: int, dtype: torch.dtype = torch.float32,
         device: str = "cpu") -> tuple[Tensor, Tensor]:
    bottom = torch.randn(batch, columns, dtype=dtype, device=device, requires_grad=True)
    pooled = torch.randn(batch, features * columns, dtype=dtype, device=device, requires_grad=True)
    return bottom, pooled


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=RELATIVE * scale)


def compare(features: int, bottom: Tensor, pooled: Tensor) -> None:
    """The chosen face against the reference in fp64: output and both gradients."""
    exact = [x.detach().double().requires_grad_() for x in (bottom, pooled)]
    expected = dot_interaction_reference(*exact, features)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out = dot_interaction(bottom, pooled, features)
    out.backward(grad.to(out.dtype))
    assert_close(out, expected.to(out.dtype))
    assert_close(bottom.grad, exact[0].grad.to(out.dtype))
    assert_close(pooled.grad, exact[1].grad.to(out.dtype))


def test_output_is_bottom_then_products_in_row_major_order(face: str) -> None:
    bottom = torch.tensor([[1.0, 2.0]])
    pooled = torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    out = dot_interaction(bottom, pooled, 2)
    # <b, v1> = 11, <b, v2> = 17, <v1, v2> = 39
    assert out.tolist() == [[1.0, 2.0, 11.0, 17.0, 39.0]]
    assert out.shape[1] == interaction_width(2, 2)


@pytest.mark.parametrize(("batch", "features", "columns"), SHAPES)
def test_face_equals_reference(face: str, batch: int, features: int, columns: int) -> None:
    compare(features, *make(batch, features, columns))


def test_gradcheck_of_reference() -> None:
    inputs = make(3, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda b, p: dot_interaction_reference(b, p, 4), inputs)


def test_fp64_is_computed_in_fp64(face: str) -> None:
    bottom, pooled = make(3, 4, 5, torch.float64)
    torch.testing.assert_close(dot_interaction(bottom, pooled, 4),
                               dot_interaction_reference(bottom, pooled, 4), rtol=0, atol=0)


def test_strided_inputs(face: str) -> None:
    wide = torch.randn(6, 5, requires_grad=True)
    pooled = torch.randn(15, 6, requires_grad=True)
    out = dot_interaction(wide[:, :5][::2], pooled.t()[::2], 3)
    expected = dot_interaction_reference(wide[::2], pooled.t()[::2], 3)
    assert_close(out, expected)
    out.sum().backward()
    ours = [wide.grad.clone(), pooled.grad.clone()]
    wide.grad = pooled.grad = None
    expected.sum().backward()
    assert_close(ours[0], wide.grad)
    assert_close(ours[1], pooled.grad)


def test_bf16_inputs_sum_in_fp32(face: str) -> None:
    bottom, pooled = (x.detach().bfloat16().requires_grad_() for x in make(4, 6, 24))
    out = dot_interaction(bottom, pooled, 6)
    expected = dot_interaction_reference(bottom.float(), pooled.float(), 6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-7, atol=1e-5)
    out.sum().backward()
    assert bottom.grad.dtype == pooled.grad.dtype == torch.bfloat16


def test_autocast_keeps_the_precision_of_the_embeddings(face: str) -> None:
    bottom, pooled = make(4, 6, 24)
    low = bottom.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dot_interaction(low, pooled, 6)
    assert out.dtype == torch.float32
    assert_close(out, dot_interaction_reference(low.float(), pooled, 6))
    out.sum().backward()
    assert pooled.grad.dtype == torch.float32


def test_only_one_input_wants_a_gradient(face: str) -> None:
    bottom, pooled = make(3, 2, 8)
    dot_interaction(bottom.detach(), pooled, 2).sum().backward()
    with torch.no_grad():
        assert not dot_interaction(bottom, pooled, 2).requires_grad
    assert pooled.grad is not None


def test_threads_do_not_change_a_bit() -> None:
    if face_of("dot_interaction", "cpu") != "native":
        pytest.skip("no native face here")
    before, results = torch.get_num_threads(), []
    bottom, pooled = make(37, 9, 20)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        bottom.grad = pooled.grad = None
        out = dot_interaction(bottom, pooled, 9)
        out.square().sum().backward()
        results.append((out.detach(), bottom.grad, pooled.grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("bottom", "pooled", "features"), [
    ((3, 4), (3, 7), 2), ((3, 4), (2, 8), 2), ((3, 4, 1), (3, 8), 2), ((3, 4), (3, 0), 0)],
    ids=["columns", "batch", "dimensions", "no-features"])
def test_shapes_that_do_not_fit(bottom: tuple[int, ...], pooled: tuple[int, ...],
                                features: int) -> None:
    with pytest.raises(InputError, match=r"need bottom \[B, D\] and pooled .* found \[3, 4"):
        dot_interaction(torch.zeros(bottom), torch.zeros(pooled), features)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "features", "columns"), SHAPES)
def test_triton_face_on_cuda(batch: int, features: int, columns: int) -> None:
    assert face_of("dot_interaction", "cuda") == "triton"
    compare(features, *make(batch, features, columns, device="cuda"))
