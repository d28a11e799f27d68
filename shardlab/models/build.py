"""Picks a model by name: what the job file's ``model:`` section becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardlab.errors import ConfigError, nearest_name
from shardlab.models.dcn import DCN
from shardlab.models.deepfm import DeepFM
from shardlab.models.dlrm import DLRM
from shardlab.models.tables import common_columns


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a dense model; each kind reads those it has.

    Attributes:
        bottom_mlp: dlrm: widths of the layers over the dense features; the embedding dimension is
            appended where the last width differs from it.
        top_mlp: widths of the hidden layers before the logit (deepfm, dcn: of the deep network).
        cross_layers: dcn: number of cross layers.
        cross_rank: dcn: rank of the cross layers' weights; None: full.
    """

    bottom_mlp: Sequence[int] = (512, 256)
    top_mlp: Sequence[int] = (512, 256)
    cross_layers: int = 3
    cross_rank: int | None = None


def _dlrm(ebc: nn.Module, num_dense: int, sizes: ModelSizes) -> DLRM:
    columns = common_columns(ebc, "dlrm")
    bottom = list(sizes.bottom_mlp)
    if not bottom or bottom[-1] != columns:
        bottom.append(columns)
    return DLRM(ebc, num_dense, bottom, sizes.top_mlp)


def _deepfm(ebc: nn.Module, num_dense: int, sizes: ModelSizes) -> DeepFM:
    return DeepFM(ebc, num_dense, sizes.top_mlp)


def _dcn(ebc: nn.Module, num_dense: int, sizes: ModelSizes) -> DCN:
    return DCN(ebc, num_dense, sizes.top_mlp, sizes.cross_layers, sizes.cross_rank)


#: kind -> how to build it.
MODELS: dict[str, Callable[[nn.Module, int, ModelSizes], nn.Module]] = {
    "dlrm": _dlrm, "deepfm": _deepfm, "dcn": _dcn}


def build_model(kind: str, ebc: nn.Module, num_dense: int, **sizes: Any) -> nn.Module:
    """Builds a model over the tables; initial weights come from torch's global generator.

    Args:
        kind: a key of `MODELS`.
        ebc: the tables.
        num_dense: number of dense features.
        **sizes: the fields of `ModelSizes`.

    Raises:
        ConfigError: unknown kind, or sizes that do not fit the tables.
    """
    if kind not in MODELS:
        raise ConfigError(f"model.kind: unknown model {kind!r}{nearest_name(kind, list(MODELS))}; "
                          f"known: {', '.join(MODELS)}")
    return MODELS[kind](ebc, num_dense, ModelSizes(**sizes))
