"""Dense products, changes of precision and copies between device and host of one rank."""

from __future__ import annotations

from functools import partial

import torch

from shardlab.launch.probe.timing import median_seconds
from shardlab.ops.linear import linear_relu

#: (samples, inputs and outputs) of a layer: a DLRM's on a core, large enough to fill a GPU.
_CPU_LAYER, _GPU_LAYER = (2048, 512), (16384, 2048)
#: A layer that only costs its launches, and the numbers of them whose difference is measured.
_TINY_LAYER = (64, 64)
FEW_LAYERS, MANY_LAYERS = 1, 9
#: Products of a layer in a step: forward, the input's gradient, the weight's gradient.
_LAYER_PRODUCTS = 3
#: A change of precision that does not fit the second-level cache.
_CODEC_ELEMENTS = 1 << 20
_FP32_BYTES = 4
#: Copies between device and host, in bytes.
COPY_BYTES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)


def flops_per_s(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Rate of a fully connected layer with ReLU, forward and backward; a multiply-add counts two.

    Args:
        device: where it runs.
        dtype: fp32, or bf16 by autocast.
        seconds: how long it repeats.
    """
    batch, side = _GPU_LAYER if device.type == "cuda" else _CPU_LAYER
    x, grad = (torch.randn(batch, side, device=device) for _ in range(2))
    x.requires_grad_()
    weight = (torch.randn(side, side, device=device) / side).requires_grad_()
    bias = torch.zeros(side, device=device, requires_grad=True)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
            out = linear_relu(x, weight, bias)
        torch.autograd.grad(out, (x, weight, bias), grad.to(out.dtype))

    return _LAYER_PRODUCTS * 2 * batch * side ** 2 / median_seconds(run, seconds, device)


def layers_seconds(device: torch.device, layers: int, seconds: float) -> float:
    """A step of so many layers that are too small to take time for anything but their launches."""
    batch, side = _TINY_LAYER
    x, target = (torch.rand(batch, side, device=device) for _ in range(2))
    weights = [torch.eye(side, device=device).requires_grad_() for _ in range(layers)]
    biases = [torch.zeros(side, device=device).requires_grad_() for _ in range(layers)]
    optimizer = torch.optim.Adam([*weights, *biases], lr=1e-6, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        out = x
        for weight, bias in zip(weights, biases, strict=True):
            out = linear_relu(out, weight, bias)
        torch.autograd.backward((out - target).square().mean())
        optimizer.step()

    return median_seconds(run, seconds, device)


def codec_bytes_per_s(device: torch.device, seconds: float) -> tuple[float, float]:
    """fp32 bytes per second that become fp16, and that are made of fp16."""
    wide = torch.randn(_CODEC_ELEMENTS, device=device)
    narrow = wide.half()
    size = _FP32_BYTES * _CODEC_ELEMENTS
    return (size / median_seconds(lambda: narrow.copy_(wide), seconds, device),
            size / median_seconds(lambda: wide.copy_(narrow), seconds, device))


def copy_seconds(device: torch.device, seconds: float) -> list[tuple[int, float]]:
    """(bytes, seconds) of copies from page-locked host memory to a CUDA device."""
    host = torch.empty(COPY_BYTES[-1], dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES[-1], dtype=torch.uint8, device=device)
    return [(size, median_seconds(
        partial(target[:size].copy_, host[:size], non_blocking=True), seconds, device))
        for size in COPY_BYTES]
