"""A fully connected layer with an optional ReLU, as one op.

    out = act(x W^T + b)                                 act: ReLU or nothing
    g'  = g where out > 0 else 0   (g without ReLU)
    dx  = g' W     dW = g'^T x     db = column sums of g'

The native face folds bias, ReLU, mask and bias gradient into the three products, so that no pass
over the activations is left beside them.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shardlab.errors import InputError
from shardlab.ops.registry import address, face_of, native

#: A register tile is 16 columns wide: below this, torch's matrix-vector products are faster.
_FEWEST_OUTPUTS = 8


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
    if _runs_native(x, weight, bias):
        return _NativeLinear.apply(x, weight, bias, relu)
    return linear_relu_reference(x, weight, bias, relu)


def linear_relu_reference(x: Tensor, weight: Tensor, bias: Tensor | None,
                          relu: bool = True) -> Tensor:
    """Plain-torch face of `linear_relu`."""
    out = functional.linear(x, weight, bias)
    return functional.relu(out) if relu else out


def _runs_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return x.dim() == 2 and x.shape[1] > 0 and weight.shape[0] >= _FEWEST_OUTPUTS \
        and all(t.dtype == torch.float32 and t.device == x.device for t in tensors) \
        and face_of("linear_relu", x.device.type) == "native" \
        and not torch.is_autocast_enabled(x.device.type) \
        and (os.environ.get("SHARDLAB_FACE") == "native" or _native_pays())


@cache
def _native_pays() -> bool:
    """Whether the native products outrun torch's on this processor.

    torch multiplies with MKL, which keeps its best kernels for Intel's processors: on AMD's Zen 4
    it reaches 80 % of the peak where the native products reach 90 %.
    """
    return native().processor_vendor() == "amd"  # type: ignore[union-attr]


class _NativeLinear(torch.autograd.Function):
    """C++ face: fp32 on CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        weight = weight.contiguous()
        (batch, inputs), outputs = x.shape, weight.shape[0]
        out = x.new_empty(batch, outputs)
        native().linear_relu_forward(  # type: ignore[union-attr]
            address(x), x.stride(0), address(weight), address(bias), address(out), batch, inputs,
            outputs, relu, torch.get_num_threads())
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        grad = grad.contiguous()
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else None
        grad_weight = torch.empty_like(weight) if wants_weight or wants_bias else None
        grad_bias = weight.new_empty(weight.shape[0]) if wants_bias else None
        native().linear_relu_backward(  # type: ignore[union-attr]
            address(grad), address(out), address(x), x.stride(0), address(weight), address(grad_x),
            address(grad_weight), address(grad_bias), x.shape[0], x.shape[1], weight.shape[0],
            torch.get_num_threads())
        return grad_x, grad_weight if wants_weight else None, grad_bias, None
