"""The bags of one feature."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab._jagged.checks import (
    check_index,
    check_values,
    offsets_of,
    present,
    read_sizes,
    size_text,
)
from shardlab.errors import InputError


class JaggedTensor:
    """The bags of one feature.

    Args:
        values: [N] ids of all bags, one after the other.
        weights: [N] floating point, one weight per id.
        lengths: [B] int32 or int64 sizes of the bags; or give ``offsets``.
        offsets: [B + 1] int32 or int64, bag b is values[offsets[b]:offsets[b + 1]].

    Raises:
        InputError: neither lengths nor offsets, wrong dtype or shape, sizes that do not add up.
    """

    def __init__(self, values: Tensor, weights: Tensor | None = None,
                 lengths: Tensor | None = None, offsets: Tensor | None = None) -> None:
        check_values(values, weights)
        self._values, self._weights = values, weights
        self._offsets = check_index(offsets, "offsets")
        found = check_index(lengths, "lengths")
        if found is None and self._offsets is None:
            raise InputError("JaggedTensor: give lengths or offsets; found neither")
        self._lengths = self._offsets.diff() if found is None else found
        if values.device.type == "cpu":
            read_sizes(self._lengths, self._offsets, len(values), ("values",))

    @classmethod
    def trusted(cls, values: Tensor, weights: Tensor | None, lengths: Tensor) -> JaggedTensor:
        """A part of bags that were checked as a whole: nothing is checked again."""
        self = cls.__new__(cls)
        self._values, self._weights, self._lengths, self._offsets = values, weights, lengths, None
        return self

    def values(self) -> Tensor:
        """[N] ids."""
        return self._values

    def lengths(self) -> Tensor:
        """[B] int64."""
        return self._lengths

    def offsets(self) -> Tensor:
        """[B + 1] int64."""
        if self._offsets is None:
            self._offsets = offsets_of(self._lengths)
        return self._offsets

    def weights(self) -> Tensor:
        """[N] weights.

        Raises:
            InputError: the ids carry none.
        """
        return present(self._weights, "JaggedTensor")

    def weights_or_none(self) -> Tensor | None:
        """[N] weights, or None."""
        return self._weights

    def device(self) -> torch.device:
        """Where the ids lie."""
        return self._values.device

    def to_dense(self) -> list[Tensor]:
        """One tensor of ids per bag."""
        return list(self._values.split(self._lengths.tolist()))

    def to_padded_dense(self, desired_length: int | None = None,
                        padding_value: float = 0) -> Tensor:
        """[B, L] ids, bags cut or padded to L = ``desired_length`` (None: the longest bag)."""
        if desired_length is None:
            desired_length = int(self._lengths.max()) if len(self._lengths) else 0
        place = torch.arange(desired_length, device=self.device())
        held = place < self._lengths[:, None]
        dense = self._values.new_full(held.shape, padding_value)
        dense[held] = self._values[(self.offsets()[:-1, None] + place)[held]]
        return dense

    def to(self, device: torch.device | str, non_blocking: bool = False) -> JaggedTensor:
        """The same bags on another device."""
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        weights = None if self._weights is None else move(self._weights)
        return JaggedTensor.trusted(move(self._values), weights, move(self._lengths))

    def __repr__(self) -> str:
        return f"JaggedTensor(bags={len(self._lengths)}, {size_text(self._values, self._weights)})"
