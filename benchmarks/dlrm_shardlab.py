"""ShardLab's column of torchrec_dlrm.py: the same tables, batches, layers and optimizers."""

from __future__ import annotations

import torch
from dlrm_data import DlrmConfig

import shardlab as sl
from shardlab.ops.allocator import keep_freed_memory
from shardlab.plan import ShardingPlan
from shardlab.specs import ShardingType
from shardlab.table_plan import build_table_plan

RULES = {"rowwise_adagrad": sl.optim.RowWiseAdagrad, "sgd": sl.optim.SGD, "adam": sl.optim.Adam}


def build(case: dict, config: DlrmConfig):
    """Returns step(batch) -> loss."""
    keep_freed_memory()
    torch.manual_seed(config.seed)
    groups = sl.comm.build_groups()
    tables = [sl.EmbeddingBagConfig(rows, config.dim, f"t{i}", (f"f{i}",))
              for i, rows in enumerate(config.rows)]
    ebc = sl.EmbeddingBagCollection(tables)
    dlrm = sl.models.DLRM(ebc, config.dense_features, config.bottom, config.top[:-1])
    model, optimizer = sl.shard(
        dlrm, make_plan(tables, case["sharding"], groups), groups=groups, seed=config.seed,
        optimizer=RULES[case["optimizer"]](lr=config.learning_rate),
        dense_optimizer=lambda p: torch.optim.SGD(p, lr=config.learning_rate))
    loss_of = torch.nn.BCEWithLogitsLoss()
    bf16 = case["dense_dtype"] == "bf16"

    def step(batch):
        dense, features, labels = batch
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(dense, features)
        loss = loss_of(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step.wire = next(iter(model.collections().values())).wire
    return step


def make_plan(tables, kind: str, groups) -> ShardingPlan:
    """One sharding type for all tables; whole tables go round the ranks, as TorchRec lays them."""
    world = groups.world_size
    whole = kind == "table_wise"
    return ShardingPlan(world, tuple(
        build_table_plan(table, ShardingType(kind), [i % world] if whole else range(world))
        for i, table in enumerate(tables)))


def make_batch(dense, ids, labels):
    """Tensors of one rank's batch; ids [tables, batch] are feature-major already."""
    features = sl.KeyedJaggedTensor([f"f{i}" for i in range(len(ids))],
                                    torch.from_numpy(ids).reshape(-1), fixed_length=1)
    return torch.from_numpy(dense), features, torch.from_numpy(labels)
