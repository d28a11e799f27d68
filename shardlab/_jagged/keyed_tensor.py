"""Pooled vectors of several features, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardlab._jagged.checks import few, index_of, running_sum, unknown_key
from shardlab.errors import InputError


class KeyedTensor:
    """One pooled vector per sample and feature, side by side in one matrix.

    Args:
        keys: feature names.
        length_per_key: columns of each feature.
        values: [B, sum of columns].
        key_dim: dimension along which features lie.

    Raises:
        InputError: the lengths do not add up to the size of ``values``.
    """

    def __init__(self, keys: Sequence[str], length_per_key: Sequence[int], values: Tensor,
                 key_dim: int = 1) -> None:
        self._keys, self._length_per_key = list(keys), list(length_per_key)
        self._values, self._key_dim = values, key_dim
        if len(self._keys) != len(self._length_per_key) or \
                sum(self._length_per_key) != values.shape[key_dim]:
            raise InputError(f"KeyedTensor: {len(self._keys)} keys of {self._length_per_key} "
                             f"columns do not fit values {list(values.shape)} "
                             f"along dimension {key_dim}")

    @staticmethod
    def from_tensor_list(keys: Sequence[str], tensors: Sequence[Tensor],
                         key_dim: int = 1) -> KeyedTensor:
        """From one [B, D] matrix per feature."""
        return KeyedTensor(keys, [tensor.shape[key_dim] for tensor in tensors],
                           torch.cat(list(tensors), dim=key_dim), key_dim)

    @staticmethod
    def regroup(keyed_tensors: Sequence[KeyedTensor],
                groups: Sequence[Sequence[str]]) -> list[Tensor]:
        """One [B, D] matrix per group: the named features of all tensors, side by side.

        Raises:
            InputError: a name that none of the tensors holds.
        """
        found: dict[str, Tensor] = {}
        for keyed in keyed_tensors:
            found.update(keyed.to_dict())
        dim = keyed_tensors[0].key_dim() if keyed_tensors else 1
        for key in (key for group in groups for key in group if key not in found):
            raise InputError(unknown_key(key, list(found)))
        return [torch.cat([found[key] for key in group], dim=dim) for group in groups]

    def keys(self) -> list[str]:
        """Feature names."""
        return self._keys

    def values(self) -> Tensor:
        """[B, sum of columns]."""
        return self._values

    def key_dim(self) -> int:
        """Dimension along which features lie."""
        return self._key_dim

    def length_per_key(self) -> list[int]:
        """Columns of each feature."""
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """Column where each feature begins, and the end."""
        return running_sum(self._length_per_key)

    def __getitem__(self, key: str) -> Tensor:
        index = index_of(self._keys, key)
        return self._values.narrow(self._key_dim, sum(self._length_per_key[:index]),
                                   self._length_per_key[index])

    def to_dict(self) -> dict[str, Tensor]:
        """[B, D] of every feature by name (views)."""
        parts = self._values.split(self._length_per_key, dim=self._key_dim)
        return dict(zip(self._keys, parts, strict=True))

    def device(self) -> torch.device:
        """Where the values lie."""
        return self._values.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> KeyedTensor:
        """The same vectors on another device."""
        return KeyedTensor(self._keys, self._length_per_key,
                           self._values.to(device, non_blocking=non_blocking), self._key_dim)

    def __repr__(self) -> str:
        return f"KeyedTensor({few(self._keys)}, values={list(self._values.shape)})"
