"""The bags of several features over one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from shardlab._jagged.checks import (
    check_index,
    check_values,
    few,
    index_of,
    maybe_slice,
    offsets_of,
    pick,
    present,
    read_sizes,
    running_sum,
    size_text,
)
from shardlab._jagged.jagged_tensor import JaggedTensor
from shardlab.errors import InputError


class KeyedJaggedTensor:
    """The bags of F features over B samples, feature-major.

    First come feature 0's bags of samples 0..B-1, then feature 1's. Tensors on the CPU are
    checked here, once. Elsewhere reading them would stall the stream: their sizes are checked
    when `length_per_key` first has to read them.

    Args:
        keys: F feature names, each once.
        values: [N] ids.
        weights: [N] floating point, one weight per id.
        lengths: [F * B] int32 or int64 sizes of the bags.
        offsets: [F * B + 1] int32 or int64; may be given instead of lengths.
        stride: B; needed only where the other arguments do not tell it.
        fixed_length: every bag holds this many ids; stands in place of lengths and offsets,
            which are then made only when asked for.

    Raises:
        InputError: says which argument was found wrong, and how.
    """

    def __init__(self, keys: Sequence[str], values: Tensor, weights: Tensor | None = None,
                 lengths: Tensor | None = None, offsets: Tensor | None = None,
                 stride: int | None = None, *, fixed_length: int | None = None) -> None:
        self._keys = list(keys)
        if len(set(self._keys)) != len(self._keys):
            twice = sorted({key for key in self._keys if self._keys.count(key) > 1})
            raise InputError(f"keys: found {twice} more than once; name every feature once")
        check_values(values, weights)
        self._values, self._weights = values, weights
        self._lengths = check_index(lengths, "lengths")
        self._offsets = check_index(offsets, "offsets")
        self.fixed_length = fixed_length
        self._stride = self._find_stride(stride)
        self._length_per_key: list[int] | None = None
        if fixed_length is not None or values.device.type == "cpu":
            self.length_per_key()

    @staticmethod
    def trusted(like: KeyedJaggedTensor, **changes: Any) -> KeyedJaggedTensor:
        """A copy of checked bags with some fields replaced by equally sound ones."""
        copy = KeyedJaggedTensor.__new__(KeyedJaggedTensor)
        copy.__dict__.update(like.__dict__)
        copy.__dict__.update({f"_{name}": value for name, value in changes.items()})
        return copy

    def _find_stride(self, stride: int | None) -> int:
        num_keys, num_bags = len(self._keys), self._count_bags(stride)
        if (num_bags % num_keys) if num_keys else num_bags:
            raise InputError(f"{num_bags} bags found; they do not divide by "
                             f"{num_keys} keys {few(self._keys)}")
        if not num_keys:
            return stride or 0
        if stride not in (None, num_bags // num_keys):
            raise InputError(f"stride: {stride} given, but {num_bags} bags of {num_keys} keys "
                             f"make a batch of {num_bags // num_keys}")
        return num_bags // num_keys

    def _count_bags(self, stride: int | None) -> int:
        if self.fixed_length is None:
            if self._lengths is None and self._offsets is None:
                raise InputError("KeyedJaggedTensor: give lengths, offsets or fixed_length; "
                                 "found none of them")
            counts = {len(t) - extra for t, extra in ((self._lengths, 0), (self._offsets, 1))
                      if t is not None}
            if len(counts) > 1:
                raise InputError(f"lengths ({len(self._lengths)}) and offsets "
                                 f"({len(self._offsets)}) are of different bags; give one of them")
            return counts.pop()
        if self._lengths is not None or self._offsets is not None:
            raise InputError("KeyedJaggedTensor: fixed_length stands in place of lengths and "
                             "offsets; give one of them")
        size, num_ids = self.fixed_length, len(self._values)
        num_bags = num_ids // size if size > 0 else (stride or 0) * len(self._keys)
        if size < 0 or num_bags * size != num_ids:
            raise InputError(f"fixed_length: {num_ids} ids do not divide into bags of {size}")
        return num_bags

    # ------------------------------------------------------------------ accessors
    def keys(self) -> list[str]:
        """F feature names."""
        return self._keys

    def values(self) -> Tensor:
        """[N] ids, feature-major."""
        return self._values

    def lengths(self) -> Tensor:
        """[F * B] int64."""
        if self._lengths is None:
            if self._offsets is not None:
                self._lengths = self._offsets.diff()
            else:
                self._lengths = torch.full((len(self._keys) * self._stride,), self.fixed_length,
                                           dtype=torch.int64, device=self._values.device)
        return self._lengths

    def offsets(self) -> Tensor:
        """[F * B + 1] int64."""
        if self._offsets is None:
            if self.fixed_length:
                self._offsets = torch.arange(0, len(self._values) + 1, self.fixed_length,
                                             device=self._values.device)
            else:
                self._offsets = offsets_of(self.lengths())
        return self._offsets

    def weights(self) -> Tensor:
        """[N] weights.

        Raises:
            InputError: the ids carry none.
        """
        return present(self._weights, "KeyedJaggedTensor")

    def weights_or_none(self) -> Tensor | None:
        """[N] weights, or None."""
        return self._weights

    def stride(self) -> int:
        """B, samples in the batch."""
        return self._stride

    def length_per_key(self) -> list[int]:
        """Ids of each feature."""
        if self._length_per_key is None:
            if self.fixed_length is not None:
                self._length_per_key = [self._stride * self.fixed_length] * len(self._keys)
            else:
                self._length_per_key = read_sizes(self.lengths(), self._offsets,
                                                  len(self._values), self._keys)
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """F + 1 places in values where the features begin and end."""
        return running_sum(self.length_per_key())

    def device(self) -> torch.device:
        """Where the ids lie."""
        return self._values.device

    def __getitem__(self, key: str) -> JaggedTensor:
        return self._part(index_of(self._keys, key), self.offset_per_key())

    def to_dict(self) -> dict[str, JaggedTensor]:
        """The bags of every feature by name (views)."""
        offsets = self.offset_per_key()
        return {key: self._part(i, offsets) for i, key in enumerate(self._keys)}

    def _part(self, index: int, offsets: list[int]) -> JaggedTensor:
        ids = slice(offsets[index], offsets[index + 1])
        bags = slice(index * self._stride, (index + 1) * self._stride)
        return JaggedTensor.trusted(self._values[ids], maybe_slice(self._weights, ids),
                                    self.lengths()[bags])

    # ------------------------------------------------------------------ moves
    def to(self, device: torch.device | str, non_blocking: bool = False) -> KeyedJaggedTensor:
        """The same bags on another device; sizes already read are not read again."""
        if self._values.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> KeyedJaggedTensor:
        """The same bags in page-locked memory, from where copies overlap with work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory until ``stream`` has used it."""
        for tensor in (self._values, self._weights, self._lengths, self._offsets):
            if tensor is not None:
                tensor.record_stream(stream)

    def _map(self, move: Callable[[Tensor], Tensor]) -> KeyedJaggedTensor:
        held = {name: getattr(self, f"_{name}")
                for name in ("values", "weights", "lengths", "offsets")}
        return KeyedJaggedTensor.trusted(self, **{name: move(tensor) for name, tensor
                                                  in held.items() if tensor is not None})

    # ------------------------------------------------------------------ parts
    def split(self, segments: Sequence[int]) -> list[KeyedJaggedTensor]:
        """Cuts the features into consecutive groups of ``segments`` features (views).

        Raises:
            InputError: the segments do not add up to the number of features.
        """
        if sum(segments) != len(self._keys) or any(size < 0 for size in segments):
            raise InputError(f"split: segments {list(segments)} do not add up to "
                             f"{len(self._keys)} keys {few(self._keys)}")
        offsets, parts = self.offset_per_key(), []
        for first, last in pairwise(running_sum(segments)):
            ids = slice(offsets[first], offsets[last])
            bags = slice(first * self._stride, last * self._stride)
            parts.append(KeyedJaggedTensor.trusted(
                self, keys=self._keys[first:last], values=self._values[ids],
                weights=maybe_slice(self._weights, ids),
                lengths=maybe_slice(self._maybe_lengths(), bags), offsets=None,
                length_per_key=self.length_per_key()[first:last]))
        return parts

    def permute(self, indices: Sequence[int]) -> KeyedJaggedTensor:
        """The features in the order of ``indices``; some may be left out.

        Raises:
            InputError: an index lies outside the features, or repeats.
        """
        order, count = list(indices), len(self._keys)
        if order == list(range(count)):
            return self
        if len(set(order)) != len(order) or any(not 0 <= i < count for i in order):
            raise InputError(f"permute: {order} must be distinct indices of {count} "
                             f"keys {few(self._keys)}")
        offsets, sizes, stride = self.offset_per_key(), self.length_per_key(), self._stride
        spans = [(offsets[i], offsets[i + 1]) for i in order]
        bags = [(i * stride, (i + 1) * stride) for i in order]
        return KeyedJaggedTensor.trusted(
            self, keys=[self._keys[i] for i in order], values=pick(self._values, spans),
            weights=pick(self._weights, spans), lengths=pick(self._maybe_lengths(), bags),
            offsets=None, length_per_key=[sizes[i] for i in order])

    def _maybe_lengths(self) -> Tensor | None:
        """Lengths, unless they follow from ``fixed_length`` and nobody asked for them."""
        return self._lengths if self.fixed_length is not None else self.lengths()

    # ------------------------------------------------------------------ other ways to make one
    @staticmethod
    def from_lengths_sync(keys: Sequence[str], values: Tensor, lengths: Tensor,
                          weights: Tensor | None = None,
                          stride: int | None = None) -> KeyedJaggedTensor:
        """From the sizes of the bags, [F * B]."""
        return KeyedJaggedTensor(keys, values, weights, lengths=lengths, stride=stride)

    @staticmethod
    def from_offsets_sync(keys: Sequence[str], values: Tensor, offsets: Tensor,
                          weights: Tensor | None = None,
                          stride: int | None = None) -> KeyedJaggedTensor:
        """From where the bags begin, [F * B + 1]."""
        return KeyedJaggedTensor(keys, values, weights, offsets=offsets, stride=stride)

    @staticmethod
    def from_dense(keys: Sequence[str], ids: Tensor) -> KeyedJaggedTensor:
        """One id per bag.

        Args:
            keys: F feature names, in the order of the columns.
            ids: [B, F] integers.

        Raises:
            InputError: not a matrix with F columns.
        """
        if ids.dim() != 2 or ids.shape[1] != len(keys):
            raise InputError(f"dense ids: expected [B, {len(keys)}], one column for each of "
                             f"{few(keys)}; found {list(ids.shape)}")
        return KeyedJaggedTensor(keys, ids.t().reshape(-1), stride=len(ids), fixed_length=1)

    @staticmethod
    def from_jt_dict(jt_dict: Mapping[str, JaggedTensor]) -> KeyedJaggedTensor:
        """From one `JaggedTensor` per feature, all of one batch size."""
        return KeyedJaggedTensor.concat([
            KeyedJaggedTensor([key], bags.values(), bags.weights_or_none(), bags.lengths())
            for key, bags in jt_dict.items()])

    @staticmethod
    def empty(is_weighted: bool = False, device: torch.device | str | None = None,
              values_dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
        """No feature and no sample."""
        return KeyedJaggedTensor(
            [], torch.empty(0, dtype=values_dtype, device=device),
            torch.empty(0, device=device) if is_weighted else None,
            lengths=torch.empty(0, dtype=torch.int64, device=device))

    @staticmethod
    def concat(kjt_list: Sequence[KeyedJaggedTensor]) -> KeyedJaggedTensor:
        """The features of several parts of the same samples, side by side.

        Raises:
            InputError: no part, batch sizes differ, or only some carry weights.
        """
        strides = sorted({part.stride() for part in kjt_list})
        weighted = sorted({part.weights_or_none() is not None for part in kjt_list})
        if len(strides) != 1 or len(weighted) != 1:
            raise InputError("concat: parts must have one batch size, and all or none carry "
                             f"weights; found batches {strides}, weighted {weighted}")
        fixed = {part.fixed_length for part in kjt_list}
        same = fixed.pop() if len(fixed) == 1 else None
        return KeyedJaggedTensor(
            [key for part in kjt_list for key in part._keys],
            torch.cat([part.values() for part in kjt_list]),
            torch.cat([part.weights() for part in kjt_list]) if weighted[0] else None,
            lengths=None if same is not None else torch.cat([p.lengths() for p in kjt_list]),
            stride=strides[0], fixed_length=same)

    def __repr__(self) -> str:
        return (f"KeyedJaggedTensor({few(self._keys)}, stride={self._stride}, "
                f"{size_text(self._values, self._weights)})")
