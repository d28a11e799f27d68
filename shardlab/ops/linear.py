"""A fully connected layer with an optional ReLU, as one op.

    out = act(x W^T + b)                                 act: ReLU or nothing
    g'  = g where out > 0 else 0   (g without ReLU)
    dx  = g' W     dW = g'^T x     db = column sums of g'

The native face folds bias, ReLU, mask and bias gradient into the three products, so that no pass
over the activations is left beside them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shardlab.errors import InputError
from shardlab.ops.registry import address, face_of, native


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> Tensor:
    """Applies a fully connected layer and, unless told otherwise, a ReLU.

    Under autocast it computes and returns in autocast's dtype, as `torch.nn.functional.linear`.

    Args:
        x: [B, inputs].
        weight: [outputs, inputs].
        bias: [outputs], or None.
        relu: whether the ReLU follows.

    Returns:
        [B, outputs].

    Raises:
        InputError: the shapes do not fit each other.
    """
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError(f"linear_relu: weight {list(weight.shape)} needs x [B, {weight.shape[1]}] "
                         f"and bias [{weight.shape[0]}], found {list(x.shape)} and "
                         f"{None if bias is None else list(bias.shape)}")
    op = _native_op(x, weight, bias)
    return linear_relu_reference(x, weight, bias, relu) if op is None \
        else op.apply(x, weight, bias, relu)


def linear_relu_reference(x: Tensor, weight: Tensor, bias: Tensor | None,
                          relu: bool = True) -> Tensor:
    """Plain-torch face of `linear_relu`."""
    out = functional.linear(x, weight, bias)
    return functional.relu(out) if relu else out


def _native_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> type[Any] | None:
    """The native face that takes these tensors, or None for the reference."""
    device = x.device.type
    parameters = (weight,) if bias is None else (weight, bias)
    fits = x.dim() == 2 and x.shape[1] > 0 and weight.shape[0] > 0 \
        and all(t.dtype == torch.float32 and t.device == x.device for t in parameters)
    if not fits or face_of("linear_relu", device) != "native":
        return None
    if not torch.is_autocast_enabled(device):
        return _NativeLinear if x.dtype == torch.float32 else None
    if x.dtype not in (torch.float32, torch.bfloat16) or \
            torch.get_autocast_dtype(device) != torch.bfloat16:
        return None
    return _NativeLinearBf16 if _has_bf16_products() else _NativeLinearRounded


@cache
def _has_bf16_products() -> bool:
    return native().has_bf16_products()  # type: ignore[union-attr]


_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def _empty_grads(wanted: tuple[bool, ...], x: Tensor, weight: Tensor) -> _Grads:
    """Room for the gradients of (x, weight, bias). The kernel sums the bias gradient while it
    packs the weight's, so that one is computed with it."""
    wants_x, wants_weight, wants_bias, _ = wanted
    return (torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None,
            torch.empty_like(weight) if wants_weight or wants_bias else None,
            weight.new_empty(weight.shape[0]) if wants_bias else None)


def _rounded(x: Tensor) -> Tensor:
    """fp32 of what bf16 keeps; contiguous."""
    return x.to(torch.bfloat16).float().contiguous()


def _wanted_grads(wanted: tuple[bool, ...], grads: _Grads) -> tuple[Tensor | None, ...]:
    """What backward returns for (x, weight, bias, relu)."""
    x, weight, bias = grads
    return x, weight if wanted[1] else None, bias, None


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """The native layer in fp32; rows of x and weight are contiguous."""
    (batch, inputs), outputs = x.shape, weight.shape[0]
    out = x.new_empty(batch, outputs)
    native().linear_relu_forward(  # type: ignore[union-attr]
        address(x), x.stride(0), address(weight), address(bias), address(out), batch, inputs,
        outputs, relu, torch.get_num_threads())
    return out


def _layer_grads(wanted: tuple[bool, ...], x: Tensor, weight: Tensor, out: Tensor | None,
                 grad: Tensor) -> tuple[Tensor | None, ...]:
    """Its gradients, as backward returns them; ``out`` with a ReLU only."""
    grads = _empty_grads(wanted, x, weight)
    native().linear_relu_backward(  # type: ignore[union-attr]
        address(grad), address(out), address(x), x.stride(0), address(weight),
        *map(address, grads), x.shape[0], x.shape[1], weight.shape[0], torch.get_num_threads())
    return _wanted_grads(wanted, grads)


class _NativeLinear(torch.autograd.Function):
    """C++ face: fp32 on CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        weight = weight.contiguous()
        out = _layer(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        return _layer_grads(ctx.needs_input_grad, x, weight, out, grad.contiguous())


class _NativeLinearBf16(torch.autograd.Function):
    """C++ face under bf16 autocast: fp32 parameters, x in fp32 or bf16, bf16 out.

    Operands are rounded to bf16 where they are packed, sums are fp32, and the gradients of the
    parameters come out in fp32 without a bf16 step in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        weight = weight.contiguous()
        (batch, inputs), outputs = x.shape, weight.shape[0]
        out = x.new_empty(batch, outputs, dtype=torch.bfloat16)
        native().linear_relu_forward_bf16(  # type: ignore[union-attr]
            address(x), x.dtype == torch.bfloat16, x.stride(0), address(weight), address(bias),
            address(out), batch, inputs, outputs, relu, torch.get_num_threads())
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        grad = grad.contiguous()
        grads = _empty_grads(ctx.needs_input_grad, x, weight)
        native().linear_relu_backward_bf16(  # type: ignore[union-attr]
            address(grad), address(out), address(x), x.dtype == torch.bfloat16, x.stride(0),
            address(weight), *map(address, grads), x.shape[0], x.shape[1], weight.shape[0],
            torch.get_num_threads())
        return _wanted_grads(ctx.needs_input_grad, grads)


class _NativeLinearRounded(torch.autograd.Function):
    """`_NativeLinearBf16` on processors without bf16 products: fp32 products of rounded operands,
    which is what such a product is. torch multiplies bf16 there element by element.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        ctx.dtype = x.dtype
        x, weight = _rounded(x), _rounded(weight)
        out = _layer(x, weight, bias, relu).to(torch.bfloat16)
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        to_x, *rest = _layer_grads(ctx.needs_input_grad, x, weight,
                                   None if out is None else out.float(),
                                   grad.float().contiguous())
        return None if to_x is None else to_x.to(ctx.dtype), *rest
