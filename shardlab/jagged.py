"""Bags of ids and pooled vectors, addressed by feature name.

Accessor names are TorchRec's, so that its users feel at home; the code is our own.
"""

from shardlab._jagged.accept import as_kjt
from shardlab._jagged.jagged_tensor import JaggedTensor
from shardlab._jagged.keyed_jagged_tensor import KeyedJaggedTensor
from shardlab._jagged.keyed_tensor import KeyedTensor

__all__ = ["JaggedTensor", "KeyedJaggedTensor", "KeyedTensor", "as_kjt"]
