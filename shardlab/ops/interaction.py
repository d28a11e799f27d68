"""DLRM's dot interaction: the inner products of every pair of a sample's vectors.

With X[N, D] the bottom MLP's output followed by the F pooled embeddings of a sample (N = F + 1):

    out = [X[0], <X[i], X[j]> for i < j in row-major order]        D + N (N - 1) / 2 columns
    dX  = (G + G^T) X,  dX[0] += d out[:D]                         G: strict upper triangle

Source: Naumov et al., arXiv 1906.00091.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardlab.errors import InputError
from shardlab.ops.registry import address, face_of, native


def dot_interaction(bottom: Tensor, pooled: Tensor, num_features: int) -> Tensor:
    """Interacts the dense vector of every sample with its pooled embeddings, and these with
    each other.

    Sums run in fp32 whatever the inputs' dtype (in fp64 for fp64).

    Args:
        bottom: floating point [B, D].
        pooled: floating point [B, num_features * D], feature after feature, as
            `KeyedTensor.values` gives it.
        num_features: F, number of vectors in a row of ``pooled``.

    Returns:
        [B, D + F (F + 1) / 2] in the inputs' common dtype: ``bottom``, then the products.

    Raises:
        InputError: the shapes do not fit each other.
    """
    _check_shapes(bottom, pooled, num_features)
    dtype = torch.promote_types(bottom.dtype, pooled.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    face = face_of("dot_interaction", bottom.device.type)
    if face == "reference" or compute != torch.float32:
        with torch.autocast(bottom.device.type, enabled=False):
            out = dot_interaction_reference(bottom.to(compute), pooled.to(compute), num_features)
    else:
        op = _NativeInteraction if face == "native" else _TritonInteraction
        out = op.apply(bottom.to(compute), pooled.to(compute), num_features)
    return out.to(dtype)


def dot_interaction_reference(bottom: Tensor, pooled: Tensor, num_features: int) -> Tensor:
    """Plain-torch face of `dot_interaction`."""
    batch, columns = bottom.shape
    vectors = torch.cat([bottom, pooled], dim=1).view(batch, num_features + 1, columns)
    products = torch.bmm(vectors, vectors.transpose(1, 2))
    rows, others = _pairs(num_features + 1, bottom.device)
    return torch.cat([bottom, products[:, rows, others]], dim=1)


def interaction_width(num_features: int, columns: int) -> int:
    """Columns of the output of `dot_interaction`."""
    return columns + num_features * (num_features + 1) // 2


@cache
def _pairs(vectors: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both indices of every pair i < j, in row-major order."""
    rows, others = torch.triu_indices(vectors, vectors, 1, device=device)
    return rows, others


def _check_shapes(bottom: Tensor, pooled: Tensor, num_features: int) -> None:
    fits = bottom.dim() == 2 and num_features >= 1 and bottom.device == pooled.device and \
        pooled.shape == (bottom.shape[0], num_features * bottom.shape[1])
    if not fits:
        raise InputError(
            f"dot_interaction: {num_features} features need bottom [B, D] and pooled "
            f"[B, {num_features} * D] on one device, found {list(bottom.shape)} on "
            f"{bottom.device} and {list(pooled.shape)} on {pooled.device}; the last layer of the "
            "bottom MLP must be as wide as every embedding")


class _NativeInteraction(torch.autograd.Function):
    """C++ face: fp32 on CPU, one sample at a time in the first-level cache."""

    @staticmethod
    def forward(ctx: Any, bottom: Tensor, pooled: Tensor, num_features: int) -> Tensor:
        bottom, pooled = bottom.contiguous(), pooled.contiguous()
        ctx.save_for_backward(bottom, pooled)
        ctx.num_features = num_features
        batch, columns = bottom.shape
        out = bottom.new_empty(batch, interaction_width(num_features, columns))
        native().dot_interaction_forward(  # type: ignore[union-attr]
            address(bottom), address(pooled), address(out), batch, num_features, columns,
            torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        bottom, pooled = ctx.saved_tensors
        grad = grad.contiguous()
        batch, columns = bottom.shape
        grad_bottom, grad_pooled = torch.empty_like(bottom), torch.empty_like(pooled)
        native().dot_interaction_backward(  # type: ignore[union-attr]
            address(grad), address(bottom), address(pooled), address(grad_bottom),
            address(grad_pooled), batch, ctx.num_features, columns, torch.get_num_threads())
        return grad_bottom, grad_pooled, None


class _TritonInteraction(torch.autograd.Function):
    """Triton face: fp32, one program per sample."""

    @staticmethod
    def forward(ctx: Any, bottom: Tensor, pooled: Tensor, num_features: int) -> Tensor:
        from shardlab.ops.triton import interaction as kernels

        bottom, pooled = bottom.contiguous(), pooled.contiguous()
        ctx.save_for_backward(bottom, pooled)
        ctx.num_features = num_features
        return kernels.forward(bottom, pooled, num_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        from shardlab.ops.triton import interaction as kernels

        bottom, pooled = ctx.saved_tensors
        return *kernels.backward(grad.contiguous(), bottom, pooled, ctx.num_features), None
