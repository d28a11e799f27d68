"""A TorchRec job: trains a step and saves itself in both ways, or loads what ShardLab exports.

    python -m tests.shardlab.interop.torchrec_job save OPTIMIZER FOLDER
    python -m tests.shardlab.interop.torchrec_job load OPTIMIZER FOLDER
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two tables under the path ``sparse.ebc``, and a linear layer."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.sparse = nn.Module()
        self.sparse.ebc = collection
        self.top = nn.Linear(12, 1)

    def forward(self, features: object) -> Tensor:
        return self.top(self.sparse.ebc(features).values())


def plain(value: object) -> object:
    """The same state with ShardedTensors as the tensors that they are on one rank."""
    if hasattr(value, "local_shards"):
        return value.local_shards()[0].tensor
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def build(kind: str) -> nn.Module:
    """The job's model, each table whole on rank 0."""
    import torchrec
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints

    torch.manual_seed(4)
    net = Net(torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=[
        torchrec.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim,
                                    feature_names=[name])
        for name, rows, dim in (("user", 10, 8), ("item", 6, 4))]))
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType(kind), "learning_rate": 0.1})
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"])
                   for name in ("user", "item")}
    plan = EmbeddingShardingPlanner(topology=Topology(1, "cpu"),
                                    constraints=constraints).plan(net, [sharder])
    return DistributedModelParallel(net, device=torch.device("cpu"), plan=plan, sharders=[sharder])


def outputs(model: nn.Module) -> Tensor:
    import torchrec

    features = torchrec.KeyedJaggedTensor(["user", "item"], torch.tensor([9, 2, 2, 5]),
                                          lengths=torch.tensor([1, 1, 1, 1]))
    found: Tensor = model(features)
    return found


def main(mode: str, kind: str, folder: str) -> None:
    """Does what the module's docstring says."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    model, path = build(kind), Path(folder)
    if mode == "save":
        outputs(model).sum().backward()
        state, moments = model.state_dict(), model.fused_optimizer.state_dict()
        dcp.save({"model": state, "optimizer": moments}, checkpoint_id=path / "dcp")
        torch.save(plain(state), path / "model.pt")
        torch.save({"state": plain(moments["state"])}, path / "optimizer.pt")
    else:
        loaded = torch.load(path / "model.pt", weights_only=True)
        moments = torch.load(path / "optimizer.pt", weights_only=True)
        own, own_moments = plain(model.state_dict()), plain(model.fused_optimizer.state_dict())
        for name, tensor in own.items():
            tensor.detach().copy_(loaded[name])
        for name, fields in own_moments["state"].items():
            for field, tensor in fields.items():
                tensor.copy_(moments["state"][name][field].view_as(tensor))
    torch.save({"outputs": outputs(model).detach(), **plain(model.state_dict()),
                **{f"{name}.{field}": tensor
                   for name, fields in plain(model.fused_optimizer.state_dict())["state"].items()
                   for field, tensor in fields.items()}}, path / "seen.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main(*sys.argv[1:])
