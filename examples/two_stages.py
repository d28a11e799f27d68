"""Unite what ranks of a host ask before it crosses hosts: fewer bytes over slow links.

    python tests/hosts.py --hosts 2 --ranks-per-host 2 --mbit 200 -- examples/two_stages.py
    torchrun --nproc-per-node 4 examples/two_stages.py    # one machine, as if it were two hosts

Trains the same model flat and in two stages; prints how far outputs differ, and what crossed hosts.
A job says `exchange: {hierarchy: two_stage}`, or leaves it to `auto`. Writes nothing.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import shardlab as sl

STEPS, BATCH = 5, 2048
ROWS = {"C1": 1_460, "C3": 20_000, "C4": 10_000, "C14": 27}


def train(groups: sl.comm.Groups) -> tuple[torch.Tensor, int, int]:
    """The last logits, and what this rank has sent across hosts and inside its own."""
    torch.manual_seed(0)
    tables = [sl.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16)
              for name, rows in ROWS.items()]
    model, optimizer = sl.shard(
        sl.models.DLRM(sl.EmbeddingBagCollection(tables), 13, bottom_mlp=[64, 16], top_mlp=[64]),
        optimizer=sl.optim.RowWiseAdagrad(lr=0.05), groups=groups)
    world = groups.world_size
    reader = sl.data.build_reader(sl.data.SourceSpec("synthetic_criteo", ROWS), BATCH,
                                  stop=STEPS * BATCH * world, rank=groups.rank, world_size=world)
    for batch in reader:
        batch = batch.to(groups.device)
        logits = model(batch.dense, batch.sparse)
        bce(logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    wire = next(iter(model.collections().values())).wire
    return logits.detach(), wire.across_bytes, wire.inside_bytes


def main() -> None:
    """Compares both ways where the ranks' hosts allow it."""
    groups = sl.comm.init()
    if groups.world_size == 4 and max(groups.host_of_rank) == 0:
        groups = sl.comm.build_groups(local_world_size=2)  # as if there were two hosts
    refusal = sl.comm.two_stages_refusal(groups)
    if refusal:
        print(f"two stages need several hosts with several ranks each: {refusal}")
        sl.comm.shutdown()
        return
    flat, flat_across, flat_inside = train(groups)
    staged = sl.comm.with_stages(groups)
    logits, across, inside = train(staged)
    if groups.rank == 0:
        print(f"logits differ by at most {float((logits - flat).abs().max()):.1e}")
        print(f"rank 0 sent {flat_across:,} B across hosts flat, {across:,} B in two stages; "
              f"{flat_inside:,} B and {inside:,} B inside its host")
        print(f"over {staged.transport}")
    sl.comm.shutdown()


if __name__ == "__main__":
    main()
