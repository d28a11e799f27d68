"""The registry of storages, and the contract that each of them keeps."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest
import torch

from shardlab.errors import ConfigError
from shardlab.plan import Shard
from shardlab.specs import EmbeddingBagConfig, RowsSpec
from shardlab.storage import LocalShard, Storage, build_storage
from shardlab.storage.registry import _STORAGES

TABLE = EmbeddingBagConfig(num_embeddings=4, embedding_dim=2, name="t")
SHARD = LocalShard(TABLE, Shard(0, 0, 4, 0, 2), False)


@dataclass(frozen=True)
class OtherSpec(RowsSpec):
    """A spec that nobody registered."""


def _local(spec):
    return replace(SHARD, table=replace(TABLE, storage=spec))


@pytest.mark.parametrize("kind", _STORAGES.values(), ids=lambda kind: kind.__name__)
def test_every_storage_keeps_the_contract(kind):
    wanted = {name: member for name, member in vars(Storage).items()
              if inspect.isfunction(member) and not name.startswith("_")}
    for name, member in wanted.items():
        assert inspect.signature(getattr(kind, name)).parameters.keys() == \
            inspect.signature(member).parameters.keys(), name


def test_spec_chooses_the_storage():
    storage = build_storage([SHARD], "sgd", 0, torch.device("cpu"))
    assert type(storage) is _STORAGES[RowsSpec]
    assert storage.shards == [SHARD]


@pytest.mark.parametrize("specs", [[OtherSpec()], [RowsSpec(), OtherSpec()]],
                         ids=["unknown", "mixed"])
def test_spec_without_a_storage_is_refused(specs):
    with pytest.raises(ConfigError, match=r"no single storage holds specs .*OtherSpec.*; known: "
                                          "RowsSpec"):
        build_storage([_local(spec) for spec in specs], "sgd", 0, torch.device("cpu"))
