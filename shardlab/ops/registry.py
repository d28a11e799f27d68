"""Which face of an op runs where: the one table that chooses, and that `shardlab doctor` prints.

Faces: ``reference`` (plain torch, always there, judges the others), ``native`` (C++, CPU tensors),
``triton`` (CUDA tensors; CPU tensors when Triton's interpreter is on). SHARDLAB_FACE forces one.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType

import torch

from shardlab.errors import ConfigError

FACES = ("reference", "native", "triton")

#: op -> faces it has beside the reference. Index arithmetic has no Triton face: on CUDA its plain
#: torch form is already a handful of device-wide sorts and scans. Reads in sorted order
#: (scatter_rows) are for CPUs. Chunks on CUDA are read and stepped by pool_blocks and update_rows,
#: and cores are stepped by update_rows; spans are scaled by torch there and encoded by encode_rows.
OPS: dict[str, tuple[str, ...]] = {
    "unique_segments": ("native",),
    "route_bags": ("native",),
    "split_sorted": ("native",),
    "pack_ids": ("native",),
    "pack_bytes": ("native",),
    "unpack_bytes": ("native",),
    "fill_affine": ("native",),
    "place_cells": ("native",),
    "route_slots": ("native",),
    "read_heads": ("native",),
    "select_columns": ("native",),
    "take_affine": ("native",),
    "sum_parts": ("native",),
    "sum_by_key": ("native",),
    "mark_members": ("native",),
    "init_uniform": ("native",),
    "init_pieces": ("native",),
    "cache_place": ("native",),
    "cache_lookup": ("native",),
    "chunk_index": ("native",),
    "redecide": ("native",),
    "read_chunks": ("native",),
    "update_chunks": ("native",),
    "step_admitted": ("native",),
    "gather_rows": ("native", "triton"),
    "scatter_rows": ("native",),
    "pool_rows": ("native", "triton"),
    "pool_blocks": ("native", "triton"),
    "sum_rows": ("native", "triton"),
    "update_rows": ("native", "triton"),
    "move_rows": ("native", "triton"),
    "encode_rows": ("native", "triton"),
    "decode_rows": ("native", "triton"),
    "encode_spans": ("native",),
    "decode_spans": ("native",),
    "sum_pieces": ("native",),
    "dot_interaction": ("native", "triton"),
    "linear_relu": ("native",),
    "tensor_train_rows": ("native", "triton"),
    "tensor_train_gradients": ("native", "triton"),
    "tensor_train_steps": ("native",),
}

#: Ops whose native face pays on one vendor's processors only. torch multiplies with MKL and oneDNN,
#: which know Intel's processors best (their bf16 products use AMX). On AMD's Zen 4 they reach 80 %
#: of the fp32 peak and leave conversions, masks and bias sums to passes of their own; the native
#: products reach 90 % with all of that inside.
_VENDOR = {"linear_relu": "amd"}


@cache
def native() -> ModuleType | None:
    """The compiled module, or None when this installation has none.

    torch is imported first (above), so that its OpenMP runtime is the one both share: two thread
    pools on the same cores would spin against each other.
    """
    if importlib.util.find_spec("shardlab._native") is None:
        return None
    from shardlab import _native

    return _native


@cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def face_of(op: str, device_type: str) -> str:
    """The face that runs ``op`` on tensors of this device type.

    Raises:
        ConfigError: SHARDLAB_FACE names no face.
    """
    # As bytes: os.environ encodes every key anew, a microsecond each, ten times a step.
    return _choose(op, device_type, os.environb.get(b"SHARDLAB_FACE"),
                   os.environb.get(b"TRITON_INTERPRET"))


@cache
def _choose(op: str, device_type: str, face: bytes | None, interpret: bytes | None) -> str:
    forced = None if face is None else os.fsdecode(face)
    if forced is not None and forced not in FACES:
        raise ConfigError(f"SHARDLAB_FACE={forced!r} is not a face; known: {', '.join(FACES)}")
    faces = OPS[op]
    if forced in faces and _can_run(forced, device_type, interpret):
        return forced
    if forced == "reference":
        return "reference"
    if device_type == "cpu" and "native" in faces and _native_pays(op):
        return "native"
    if device_type == "cuda" and "triton" in faces and has_triton():
        return "triton"
    return "reference"


def _native_pays(op: str) -> bool:
    module = native()
    return module is not None and _VENDOR.get(op) in (None, module.processor_vendor())


def _can_run(face: str, device_type: str, interpret: bytes | None) -> bool:
    if face == "native":
        return device_type == "cpu" and native() is not None
    if face == "triton":
        return has_triton() and (device_type == "cuda" or interpret == b"1")
    return True


def describe_faces() -> list[tuple[str, str, str]]:
    """(op, face, reason) for every op, on the device that training would use here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op, faces in OPS.items():
        face = face_of(op, device)
        reason = f"{device} tensors"
        module = native()
        if face == "native" and module is not None:
            reason = f"CPU tensors, {module.isa()} of {', '.join(module.isas())}"
        elif face == "reference" and "native" in faces and device == "cpu":
            reason = "SHARDLAB_FACE"
            if module is None:
                reason = "the native library is not built"
            elif not _native_pays(op):
                reason = f"torch is faster on {module.processor_vendor()} processors"
        rows.append((op, face, reason))
    return rows


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's data starts, 0 for None: what the native face takes."""
    return 0 if tensor is None else tensor.data_ptr()


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuses a tensor that a kernel would misread.

    Raises:
        TypeError: other dtype, or not contiguous.
    """
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise TypeError(f"{name}: expected a contiguous {dtype} tensor, found {tensor.dtype}, "
                        f"shape {tuple(tensor.shape)}, strides {tensor.stride()}")
