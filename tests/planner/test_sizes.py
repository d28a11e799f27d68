"""Sizes of many pieces at once against `tier_bytes` of one."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from shardlab.planner.enumerate import enumerate_options
from shardlab.planner.sizes import IMPOSSIBLE, TIERS, piece_bytes, shard_bytes
from shardlab.planner.topology_file import read_topology
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage_bytes import OPTIMIZER_STATE, tier_bytes
from shardlab.storage_specs import RowsSpec, Tier
from shardlab.storage_text import parse_storage

STORAGES = ["fp32", "int8", {"dtype": "fp16", "tier": "ssd"},
            {"kind": "pruned", "budget": {"ratio": 0.1}}, {"kind": "tensor_train", "rank": 4},
            {"levels": [{"dtype": "fp32", "fraction": 0.03}, {"dtype": "int4"}]}]


@hypothesis.given(rows=st.integers(1, 3_000_000), columns=st.sampled_from([2, 16, 48, 130]),
                  storage=st.sampled_from(STORAGES), optimizer=st.sampled_from([*OPTIMIZER_STATE]))
@hypothesis.settings(max_examples=80)
def test_pieces_take_what_their_shards_take(rows: int, columns: int, storage: object,
                                            optimizer: str) -> None:
    table = EmbeddingBagConfig(rows, columns, "t", storage=storage,  # type: ignore[arg-type]
                               exchange="rows")
    options = enumerate_options([table], read_topology("2x4xh100"), tuple(Tier))
    for option, found in enumerate(piece_bytes(options, optimizer).tolist()):
        spec = options.storage(option)
        size = tier_bytes(spec, int(options.rows[option]), int(options.columns[option]), optimizer)
        exact = [size.hbm, size.ddr, size.ssd]
        if not isinstance(spec, RowsSpec) or len(spec.levels) == 1:
            assert found == exact
            continue
        for ours, truth in zip(found, exact, strict=True):
            assert truth <= ours <= truth * 1.01 + 32 * (columns * 12 + 64)


def test_records_too_long_for_a_disk_are_impossible() -> None:
    table = EmbeddingBagConfig(10, 20_000, "t", storage={"dtype": "fp32", "tier": "ssd"},
                               sharding="table_wise")
    options = enumerate_options([table], read_topology("8xh100"))
    assert (piece_bytes(options, "sgd")[:, 2] == IMPOSSIBLE).all()


@pytest.mark.parametrize("optimizer", OPTIMIZER_STATE)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_parts_of_a_shard_add_up(storage: object, optimizer: str) -> None:
    spec = parse_storage(storage, "t")
    assert not hasattr(spec, "options")
    parts = shard_bytes(spec, 5000, 48, optimizer)  # type: ignore[arg-type]
    whole = tier_bytes(spec, 5000, 48, optimizer)  # type: ignore[arg-type]
    assert parts.total == whole
    assert (parts.state.total > 0) is (optimizer != "sgd")
    assert (parts.cache.total > 0) is (isinstance(spec, RowsSpec) and len(spec.levels) > 1)
    assert (parts + parts).total == whole + whole
    assert np.all([getattr(parts.tables, tier.value) >= 0 for tier in TIERS])
