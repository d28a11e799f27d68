"""What crosses the wire: the same steps under several plans, bytes counted by the program.

    torchrun --nproc-per-node 2 examples/row_wise_torchrun.py

Under `exchange: rows` every rank sends its unique ids and gets each row once, however often the
batch names it. Under `exchange: pooled` it sends all ids, and gets bags that their owners pooled.
On CUDA machines the same script runs over NCCL.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import shardlab as sl
from shardlab.presets import criteo_kaggle_tables

BATCH, STEPS = 512, 4
PLANS = (("table_wise", "rows"), ("column_wise", "rows"), ("row_wise", "rows"),
         ("row_wise", "pooled"), ("data_parallel", "rows"))


def bytes_per_step(sharding: str, exchange: str, groups: sl.comm.Groups) -> list[float]:
    """KiB of (ids, rows, gradients) that all ranks together send in a step."""
    tables = criteo_kaggle_tables(16, max_rows=50_000, sharding=sl.ShardingType(sharding),
                                  exchange=exchange)
    torch.manual_seed(0)
    model = sl.models.DeepFM(sl.EmbeddingBagCollection(tables), 13, deep_mlp=[32])
    model, optimizer = sl.shard(model, groups=groups)  # lays tables out as their `sharding` asks
    spec = sl.data.SourceSpec("synthetic_criteo",
                              {table.feature_names[0]: table.num_embeddings for table in tables})
    for batch in sl.data.build_reader(spec, BATCH, rank=groups.rank, world_size=groups.world_size,
                                      stop=STEPS * BATCH * groups.world_size):
        optimizer.zero_grad()
        moved = batch.to(groups.device)
        logits = model(moved.dense, moved.sparse)
        binary_cross_entropy_with_logits(logits, moved.labels).backward()
        optimizer.step()
    wire = model.collections()["ebc"].wire  # what this rank sent to others
    sent = torch.tensor([wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes],
                        dtype=torch.float64, device=groups.device)
    return (sl.comm.all_reduce_(sent, groups) / (STEPS * 1024)).tolist()


def main() -> None:
    """Prints one line for every plan."""
    groups = sl.comm.init()
    if groups.rank == 0:
        print(f"{groups.world_size} rank(s) on {groups.device.type}, {BATCH} samples each: "
              "KiB per step")
        print(f"{'sharding':<14} {'exchange':<9} {'ids':>8} {'rows':>8} {'gradients':>10}")
    for sharding, exchange in PLANS:
        ids, rows, gradients = bytes_per_step(sharding, exchange, groups)
        if groups.rank == 0:
            print(f"{sharding:<14} {exchange:<9} {ids:8,.0f} {rows:8,.0f} {gradients:10,.0f}")
    sl.comm.shutdown()


if __name__ == "__main__":
    main()
