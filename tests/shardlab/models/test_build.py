"""Models by name."""

from __future__ import annotations

import pytest

from shardlab.errors import ConfigError
from shardlab.models import DCN, DLRM, DeepFM, build_model
from tests.shardlab.models.plain_tables import NUM_DENSE, PlainTables


@pytest.mark.parametrize(("kind", "expected"), [("dlrm", DLRM), ("deepfm", DeepFM), ("dcn", DCN)])
def test_kind_decides_the_class(kind: str, expected: type) -> None:
    assert type(build_model(kind, PlainTables(), NUM_DENSE)) is expected


@pytest.mark.parametrize(("given", "built"), [((20,), [20, 8]), ((20, 8), [20, 8]), ((), [8])],
                         ids=["appended", "kept", "empty"])
def test_dlrm_bottom_ends_in_the_embedding_dimension(given: tuple[int, ...],
                                                     built: list[int]) -> None:
    model = build_model("dlrm", PlainTables(), NUM_DENSE, bottom_mlp=given)
    assert [layer.weight.shape[0] for layer in model.bottom.layers] == built


def test_sizes_reach_the_model() -> None:
    model = build_model("dcn", PlainTables(), NUM_DENSE, top_mlp=(7,), cross_layers=4,
                        cross_rank=2)
    assert len(model.cross.up) == 4
    assert model.cross.down[0].shape[0] == 2
    assert model.deep.layers[0].weight.shape[0] == 7


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'dcm' \(did you mean 'dcn'\?\); known"):
        build_model("dcm", PlainTables(), NUM_DENSE)
