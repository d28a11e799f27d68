"""The registry of storages, and the contract that each of them keeps."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import pytest
import torch

from shardlab.errors import ConfigError
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage import LocalShard, Storage, StorageOptions, build_storage
from shardlab.storage.registry import _STORAGES
from shardlab.storage_specs import RowsSpec
from shardlab.storage_text import parse_storage
from shardlab.table_plan import Shard

TABLE = EmbeddingBagConfig(num_embeddings=4, embedding_dim=2, name="t")
SHARD = LocalShard(TABLE, Shard(0, 0, 4, 0, 2), RowsSpec(), False)


@dataclass(frozen=True)
class OtherSpec(RowsSpec):
    """A spec that nobody registered."""


def _local(spec):
    return replace(SHARD, storage=spec)


@pytest.mark.parametrize("kind", _STORAGES.values(), ids=lambda kind: kind.__name__)
def test_every_storage_keeps_the_contract(kind):
    wanted = {name: member for name, member in vars(Storage).items()
              if inspect.isfunction(member) and not name.startswith("_")}
    for name, member in wanted.items():
        assert inspect.signature(getattr(kind, name)).parameters.keys() == \
            inspect.signature(member).parameters.keys(), name


def test_spec_chooses_the_storage():
    storage = build_storage([SHARD], StorageOptions("sgd", 0, torch.device("cpu")))
    assert type(storage) is _STORAGES[RowsSpec]
    assert storage.shards == [SHARD]


@pytest.mark.parametrize("spec", [
    OtherSpec()], ids=lambda spec: type(spec).__name__)
def test_spec_without_a_storage_is_refused_by_table(spec):
    with pytest.raises(ConfigError, match=r"table 't': storage .* can be planned but not trained; "
                                          "kinds that can: RowsSpec, TensorTrainSpec, PrunedSpec"):
        build_storage([SHARD, _local(spec)], StorageOptions("sgd", 0, torch.device("cpu")))


@pytest.mark.parametrize(("storage", "text"), [
    ({"tier": "ssd"}, "needs a cache in memory above the disk, such as levels"),
    ({"levels": [{"tier": "ddr", "fraction": 0.5}, {"tier": "ssd"}]},
     "needs a folder on the disk: set train.ssd_dir")], ids=["no cache", "no folder"])
def test_home_on_disk_needs_a_cache_and_a_folder(storage, text):
    local = _local(parse_storage(storage, "here"))
    with pytest.raises(ConfigError, match=f"table 't': storage .* {text}"):
        build_storage([local], StorageOptions("sgd", 0, torch.device("cpu")))
