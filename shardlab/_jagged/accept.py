"""Whatever form of features a user holds, as a `KeyedJaggedTensor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardlab._jagged.checks import ID_DTYPES, few
from shardlab._jagged.keyed_jagged_tensor import KeyedJaggedTensor
from shardlab.errors import InputError


def as_kjt(features: Any, keys: Sequence[str]) -> KeyedJaggedTensor:
    """Reads a batch of features in any accepted form; ids become int64, weights fp32.

    Names are not matched here: the result has the names that the input carries. Bags that are
    already in the wanted form are returned as they are.

    Args:
        features: a `KeyedJaggedTensor`; any object with keys(), values(), lengths() and
            optionally weights_or_none() or weights(); a dict of feature to (values, lengths),
            (values, lengths, weights) or an object with values() and lengths(); or a dense
            integer matrix [B, F] whose columns are in the order of ``keys``.
        keys: names of the columns of a dense matrix.

    Raises:
        InputError: wrong type, shape or dtype; names the feature where there is one.
    """
    if isinstance(features, KeyedJaggedTensor):
        return _as_ids(features)
    if isinstance(features, Mapping):
        return _from_dict(features)
    if isinstance(features, (Tensor, np.ndarray)):
        return _as_ids(KeyedJaggedTensor.from_dense(keys, _tensor(features, "dense ids")))
    if all(callable(getattr(features, name, None)) for name in ("keys", "values", "lengths")):
        return _as_ids(_from_like(features))
    raise InputError("features: expected a KeyedJaggedTensor, an object with keys(), values() "
                     "and lengths(), a dict of (values, lengths), or an integer matrix [B, F]; "
                     f"found {type(features).__name__}")


def _as_ids(bags: KeyedJaggedTensor) -> KeyedJaggedTensor:
    values, weights = bags.values(), bags.weights_or_none()
    if values.dtype is torch.int64 and (weights is None or weights.dtype is torch.float32):
        return bags
    _check_ids(values, f"features {few(bags.keys())}")
    return KeyedJaggedTensor.trusted(bags, values=values.long(),
                                     weights=None if weights is None else weights.float())


def _check_ids(values: Tensor, where: str) -> None:
    # An empty tensor is float32 by torch's default; it holds no id that could be wrong.
    if values.dtype not in ID_DTYPES and len(values):
        raise InputError(f"{where}: ids must be integers, found {values.dtype}")


def _from_like(features: Any) -> KeyedJaggedTensor:
    if getattr(features, "variable_stride_per_key", bool)():
        raise InputError("features: a batch size per key (variable stride) is not supported; "
                         "give every feature one bag per sample")
    return KeyedJaggedTensor(list(features.keys()), features.values(), _weights_of(features),
                             lengths=features.lengths())


def _weights_of(features: Any) -> Tensor | None:
    read = getattr(features, "weights_or_none", None) or getattr(features, "weights", None)
    return read() if callable(read) else None


def _from_dict(features: Mapping[str, Any]) -> KeyedJaggedTensor:
    if not features:
        return KeyedJaggedTensor.empty()
    parts = [_one_feature(name, entry) for name, entry in features.items()]
    first = parts[0]
    for name, part in zip(features, parts, strict=True):
        if part.stride() != first.stride():
            raise InputError(f"feature {name!r}: batch of {part.stride()}, but feature "
                             f"{first.keys()[0]!r} has a batch of {first.stride()}")
        if (part.weights_or_none() is None) != (first.weights_or_none() is None):
            raise InputError(f"feature {name!r}: either every feature carries weights or none "
                             f"does; feature {first.keys()[0]!r} differs")
    return KeyedJaggedTensor.concat(parts)


def _one_feature(name: str, entry: Any) -> KeyedJaggedTensor:
    where = f"feature {name!r}"
    if callable(getattr(entry, "values", None)) and callable(getattr(entry, "lengths", None)):
        entry = (entry.values(), entry.lengths(), _weights_of(entry))
    if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
        raise InputError(f"{where}: expected (values, lengths), (values, lengths, weights) or a "
                         f"JaggedTensor, found {type(entry).__name__}")
    values, lengths, weights = (*entry, None)[:3]
    values, lengths = _tensor(values, f"{where}: values"), _tensor(lengths, f"{where}: lengths")
    weights = None if weights is None else _tensor(weights, f"{where}: weights")
    _check_ids(values, where)
    try:
        return _as_ids(KeyedJaggedTensor([name], values, weights, lengths=lengths))
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(where) else f"{where}: {text}") from None


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise InputError(f"{what}: expected a tensor, found {type(value).__name__}")
    return value
