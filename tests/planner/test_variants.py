"""Which chains of tiers a storage is tried on."""

from __future__ import annotations

import pytest

from shardlab.planner.variants import storage_variants
from shardlab.storage_specs import Tier, describe_storage
from shardlab.storage_text import parse_storage

ALL = tuple(Tier)


def texts(storage: object, tiers: tuple[Tier, ...] = ALL, *, link: bool = True) -> list[str]:
    found = storage_variants(parse_storage(storage, "t"), tiers, link)
    return [describe_storage(variant.spec) for variant in found]


def test_a_plain_storage_is_tried_everywhere() -> None:
    found = texts("int8")
    assert found[:3] == ["int8 on hbm", "int8 on ddr", "int8 on ssd"]
    assert "int8 on ddr under int8 0.05 on hbm" in found
    assert "int8 on ssd under int8 0.2 on ddr" in found
    assert "int8 on ssd under int8 0.05 on ddr under int8 0.01 on hbm" in found
    assert len(found) == len(set(found)) == 14


def test_caches_in_front_of_ddr_need_a_link() -> None:
    assert texts("fp32", (Tier.HBM, Tier.DDR), link=False) == ["fp32 on hbm", "fp32 on ddr"]
    assert texts("fp32", (Tier.HBM,)) == ["fp32 on hbm"]


@pytest.mark.parametrize("tier", ["hbm", "ddr", "ssd"])
def test_a_named_tier_is_kept(tier: str) -> None:
    assert texts({"dtype": "fp16", "tier": tier}) == [f"fp16 on {tier}"]


def test_open_levels_go_from_near_to_far() -> None:
    levels = [{"dtype": "fp32", "fraction": 0.1}, {"dtype": "int8"}]
    assert texts({"levels": levels}) == [
        "int8 on hbm under fp32 0.1 on hbm", "int8 on ddr under fp32 0.1 on hbm",
        "int8 on ssd under fp32 0.1 on hbm", "int8 on ddr under fp32 0.1 on ddr",
        "int8 on ssd under fp32 0.1 on ddr"]
    levels[1]["tier"] = "ddr"
    assert texts({"levels": levels}) == ["int8 on ddr under fp32 0.1 on hbm",
                                         "int8 on ddr under fp32 0.1 on ddr"]


def test_what_is_computed_from_stays_near() -> None:
    tensor_train = {"kind": "tensor_train", "rank": 8}
    pruned = {"kind": "pruned", "budget": {"ratio": 0.1}, "tier": "ddr"}
    assert len(texts(tensor_train)) == 1
    assert len(texts(tensor_train, link=False)) == 2
    assert len(texts(pruned)) == 1


def test_choices_keep_their_order() -> None:
    request = parse_storage({"choose": ["fp32", "bf16", {"dtype": "int8", "tier": "hbm"}]}, "t")
    found = storage_variants(request, (Tier.HBM,), True)
    assert [(describe_storage(entry.spec), entry.preference) for entry in found] == [
        ("fp32 on hbm", 0), ("bf16 on hbm", 1), ("int8 on hbm", 2)]
