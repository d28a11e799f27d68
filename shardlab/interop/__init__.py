"""Tables in and out: other formats, TorchRec's checkpoints, quantised tables for inference."""

from shardlab.interop.export import FORMATS, export
from shardlab.interop.torchrec import import_torchrec

__all__ = ["FORMATS", "export", "import_torchrec"]
