"""A checkpoint does not know plans: save under one, load under another, on the same or other ranks.

    python examples/checkpoint_resharding.py
    torchrun --nproc-per-node 2 examples/checkpoint_resharding.py

Checkpoints are folders of safetensors files and JSON with checksums, without pickle; table rows
and their optimiser state are stored as rectangles of the whole table.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import shardlab as sl
from shardlab.table_plan import build_table_plan

ROWS = {"C1": 1_460, "C3": 20_000, "C14": 27}
TABLES = [sl.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16)
          for name, rows in ROWS.items()]


def build(kind: str, groups: sl.comm.Groups, seed: int):
    """A DLRM whose tables are all cut in one way over all ranks."""
    ranks = list(range(groups.world_size))
    plan = sl.ShardingPlan(groups.world_size, tuple(
        build_table_plan(table, sl.ShardingType(kind), ranks) for table in TABLES))
    torch.manual_seed(seed)
    model = sl.models.DLRM(sl.EmbeddingBagCollection(TABLES), 13, bottom_mlp=[32, 16], top_mlp=[32])
    return sl.shard(model, plan, optimizer=sl.optim.RowWiseAdagrad(lr=0.05), groups=groups,
                    seed=seed)


def train(model, optimizer, groups: sl.comm.Groups, start: int, stop: int) -> torch.Tensor:
    """Trains on rows [start, stop); returns the logits of the last batch before its step."""
    reader = sl.data.build_reader(
        sl.data.SourceSpec("synthetic_criteo", ROWS), batch_size=256, rank=groups.rank,
        world_size=groups.world_size, start=start, stop=stop)
    for batch in reader:
        optimizer.zero_grad()
        moved = batch.to(groups.device)
        logits = model(moved.dense, moved.sparse)
        binary_cross_entropy_with_logits(logits, moved.labels).backward()
        optimizer.step()
    return logits.detach()


def main() -> None:
    """Trains under one plan, goes on under another, and compares with not having changed it."""
    groups = sl.comm.init()
    with tempfile.TemporaryDirectory() as own:
        folder = Path(sl.comm.broadcast_text(own if groups.rank == 0 else None, groups))
        model, optimizer = build("row_wise", groups, seed=0)
        train(model, optimizer, groups, 0, 10_240)
        sl.save(folder / "step-20", model, optimizer, groups, {"next_row": 10_240})

        other, other_optimizer = build("column_wise", groups, seed=1)
        extra = sl.load(folder / "step-20", other, other_optimizer, groups)
        stop = extra["next_row"] + 2_560
        kept = train(model, optimizer, groups, extra["next_row"], stop)
        changed = train(other, other_optimizer, groups, extra["next_row"], stop)
        difference = float((kept - changed).abs().max())
        if groups.rank == 0:
            for name, trained in (("saved", model), ("loaded", other)):
                shards = trained.collections()["ebc"].plan.tables[1].shards
                print(name, [f"rank {s.rank}: {s.rows} x {s.columns}" for s in shards])
            print(f"logits after 5 more steps differ by at most {difference:.1e}")
        sl.comm.barrier(groups)
    assert difference < 1e-4
    sl.comm.shutdown()


if __name__ == "__main__":
    main()
