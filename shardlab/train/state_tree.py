"""Nested state (dicts, lists, numbers, tensors) as JSON text plus named tensors: no pickle.

JSON holds the structure and every plain value; a tensor is replaced by its name. What JSON cannot
say by itself is an object with the one extra key ``"@"``:

    {"@": "tensor", "name": "optimizer/state/0/exp_avg"}
    {"@": "array", "name": ..., "dtype": "uint32", "shape": [624]}      (numpy, stored as bytes)
    {"@": "tuple", "items": [...]}
    {"@": "dict", "items": [[key, value], ...]}                         (keys that are not strings)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardlab.errors import CheckpointError

_MARK = "@"
_PLAIN = (bool, int, float, str, type(None))


def flatten_state(state: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Splits nested state into a JSON tree and its tensors.

    Args:
        state: dicts, lists, tuples, None, bool, int, float, str, tensors, numeric numpy arrays.
        name: prefix of the tensors' names.

    Returns:
        (tree, tensors): ``json.dumps(tree)`` works; tensors are detached and on the host.

    Raises:
        CheckpointError: a value of any other type; names its place.
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(state, name, tensors), tensors


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu()
        return {_MARK: "tensor", "name": name}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensors[name] = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        return {_MARK: "array", "name": name, "dtype": value.dtype.str, "shape": [*value.shape]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {_MARK: "tuple", "items": items}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _MARK not in value:
            return {key: _flatten(item, f"{name}/{key}", tensors) for key, item in value.items()}
        return {_MARK: "dict", "items": [
            [_flatten(key, f"{name}/key{i}", tensors), _flatten(item, f"{name}/{key}", tensors)]
            for i, (key, item) in enumerate(value.items())]}
    raise CheckpointError(f"state {name or '<root>'!r}: cannot save a {type(value).__name__} "
                          "without pickle; use numbers, strings, lists, dicts or tensors")


def unflatten_state(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Rebuilds what `flatten_state` split: equal values of the same types.

    Raises:
        CheckpointError: the tree names a tensor that is not there, or an unknown mark.
    """
    if isinstance(tree, list):
        return [unflatten_state(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    mark = tree.get(_MARK)
    if mark is None:
        return {key: unflatten_state(item, tensors) for key, item in tree.items()}
    if mark == "tuple":
        return tuple(unflatten_state(item, tensors) for item in tree["items"])
    if mark == "dict":
        return {unflatten_state(key, tensors): unflatten_state(item, tensors)
                for key, item in tree["items"]}
    if mark not in ("tensor", "array"):
        raise CheckpointError(f"state tree has the unknown mark {mark!r}")
    if tree["name"] not in tensors:
        raise CheckpointError(f"state tree names tensor {tree['name']!r}, which is not stored")
    tensor = tensors[tree["name"]]
    if mark == "tensor":
        return tensor
    return np.frombuffer(tensor.numpy().tobytes(), tree["dtype"]).reshape(tree["shape"]).copy()
