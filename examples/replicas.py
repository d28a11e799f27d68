"""Replica groups of the tables (2D parallelism): small all-to-alls, and copies kept alike.

    torchrun --nproc-per-node 2 examples/replicas.py

Trains the same model in one group of all ranks, in two groups that merge the gradients of every
step, and in two groups that average rows every 5 steps. Writes nothing; prints what rank 0 sent,
and how far outputs differ from those of one group.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import shardlab as sl

STEPS, BATCH = 20, 256
ROWS = {"C1": 1_460, "C3": 200_000, "C4": 100_000, "C14": 27}


def train(groups: sl.comm.Groups, replicas: int, sync_every_steps: int) -> tuple[torch.Tensor, str]:
    """The last logits, and what this rank sent."""
    torch.manual_seed(0)
    tables = [sl.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16)
              for name, rows in ROWS.items()]
    plan = sl.simple_plan(tables, groups, replicas, sync_every_steps)
    model, optimizer = sl.shard(
        sl.models.DLRM(sl.EmbeddingBagCollection(tables), 13, bottom_mlp=[64, 16], top_mlp=[64]),
        plan, optimizer=sl.optim.RowWiseAdagrad(lr=0.05), groups=groups)
    reader = sl.data.build_reader(
        sl.data.SourceSpec("synthetic_criteo", ROWS), BATCH, rank=groups.rank,
        world_size=groups.world_size, stop=STEPS * BATCH * groups.world_size)
    for batch in (batch.to(groups.device) for batch in reader):
        logits = model(batch.dense, batch.sparse)
        bce(logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    wire = model.collections()["ebc"].wire
    inside = wire.total - wire.sync_bytes
    return logits.detach(), f"{inside:,} bytes in its group, {wire.sync_bytes:,} between groups"


def main() -> None:
    """Compares the three ways on whatever ranks there are."""
    groups = sl.comm.init()
    two = 2 if groups.world_size % 2 == 0 else 1
    one_group, _ = train(groups, 1, 1)
    for name, replicas, every in (("one group", 1, 1), ("every step", two, 1),
                                  ("every 5 steps", two, 5)):
        logits, sent = train(groups, replicas, every)
        if groups.rank == 0:
            difference = float((logits - one_group).abs().max())
            print(f"{name}: logits differ by at most {difference:.1e}; rank 0 sent {sent}")
    sl.comm.shutdown()


if __name__ == "__main__":
    main()
