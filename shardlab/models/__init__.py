"""Dense models over pooled embeddings: DLRM, DeepFM and DCN v2, and `build_model` to pick one.

A model holds its tables as ``self.ebc`` and only calls it; `shardlab.shard` works with any other
module that does the same.
"""

from shardlab.models.build import MODELS, ModelSizes, build_model
from shardlab.models.dcn import DCN, CrossNet
from shardlab.models.deepfm import DeepFM
from shardlab.models.dlrm import DLRM
from shardlab.models.mlp import MLP, Layer

__all__ = ["DCN", "DLRM", "MLP", "MODELS", "CrossNet", "DeepFM", "Layer", "ModelSizes",
           "build_model"]
