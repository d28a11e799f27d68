"""Arithmetic and checks shared by the jagged and keyed tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardlab.errors import InputError, nearest_name

#: Dtypes that ids may have; they are widened to int64.
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_INDEX_DTYPES = (torch.int64, torch.int32)
_SHOWN_KEYS = 6


def check_values(values: Any, weights: Any) -> None:
    """Refuses ids that are not 1-D, and weights that are not one floating number per id."""
    check_1d(values, "values")
    if weights is None:
        return
    check_1d(weights, "weights")
    if not weights.is_floating_point():
        raise InputError(f"weights: expected floating point, found {weights.dtype}")
    if len(weights) != len(values):
        raise InputError(f"weights: {len(weights)} found for {len(values)} ids; give one per id")


def check_1d(tensor: Any, what: str) -> None:
    """Refuses anything but a 1-D tensor."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 1:
        found = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) \
            else type(tensor).__name__
        raise InputError(f"{what}: expected a 1-D tensor, found {found}")


def check_index(tensor: Any, what: str) -> Tensor | None:
    """Lengths or offsets as int64; refuses other than 1-D int32 and int64."""
    if tensor is None:
        return None
    check_1d(tensor, what)
    if tensor.dtype not in _INDEX_DTYPES:
        raise InputError(f"{what}: expected int32 or int64, found {tensor.dtype}")
    if what == "offsets" and not len(tensor):
        raise InputError("offsets: empty; expected one more entry than there are bags")
    return tensor.long()


def read_sizes(lengths: Tensor, offsets: Tensor | None, num_ids: int,
               keys: Sequence[str]) -> list[int]:
    """Ids of each key, read from the lengths of all bags.

    Raises:
        InputError: a negative length, offsets that do not start at 0 or differ from the
            lengths, or sizes that do not add up to ``num_ids``.
    """
    batch = len(lengths) // len(keys) if keys else 0
    if len(lengths) and int(lengths.min()) < 0:
        bag = int(lengths.argmin())
        raise InputError(f"feature {keys[bag // batch]!r}: the bag of sample {bag % batch} has "
                         f"length {int(lengths[bag])}; lengths must be 0 or more")
    if offsets is not None and int(offsets[0]):
        raise InputError(f"offsets: must start at 0, found {int(offsets[0])}")
    if offsets is not None and not torch.equal(offsets.diff(), lengths):
        raise InputError("lengths and offsets are both given and differ; give one of them")
    sizes = lengths.view(len(keys), batch).sum(1).tolist() if keys else []
    if sum(sizes) != num_ids:
        raise InputError(f"lengths add up to {sum(sizes)} ids, values holds {num_ids} "
                         f"(keys {few(keys)}, batch {batch})")
    return sizes


def offsets_of(lengths: Tensor) -> Tensor:
    """[N + 1] running sum of [N] lengths, from 0."""
    offsets = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def running_sum(sizes: Sequence[int]) -> list[int]:
    """N + 1 places where N consecutive parts begin and end."""
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)
    return sums


def maybe_slice(tensor: Tensor | None, part: slice) -> Tensor | None:
    """The part of a tensor that may be absent."""
    return None if tensor is None else tensor[part]


def pick(tensor: Tensor | None, spans: Sequence[tuple[int, int]]) -> Tensor | None:
    """The spans of a tensor that may be absent, in this order."""
    if tensor is None:
        return None
    return torch.cat([tensor[start:end] for start, end in spans]) if spans else tensor[:0]


def present(weights: Tensor | None, what: str) -> Tensor:
    """The weights; raises where there are none."""
    if weights is None:
        raise InputError(f"{what}: weights() asked, but the ids carry none; "
                         "use weights_or_none()")
    return weights


def index_of(keys: list[str], key: str) -> int:
    """Place of a key; an unknown one is an error that names the nearest."""
    if key not in keys:
        raise InputError(unknown_key(key, keys))
    return keys.index(key)


def unknown_key(key: str, keys: list[str]) -> str:
    """Text of the error for a key that is not there."""
    return f"unknown feature {key!r}{nearest_name(str(key), keys)}; known: {few(keys)}"


def few(keys: Sequence[str]) -> str:
    """The first keys, and how many there are in all."""
    more = f", ... {len(keys)} in all" if len(keys) > _SHOWN_KEYS else ""
    return f"[{', '.join(keys[:_SHOWN_KEYS])}{more}]"


def size_text(values: Tensor, weights: Tensor | None) -> str:
    """Short text of how many ids there are, for reprs."""
    weighted = "" if weights is None else ", weighted"
    return f"ids={len(values)} {str(values.dtype).removeprefix('torch.')}{weighted}"
