"""Exchange batches before they train: the same bits, less waiting where links are slow.

    torchrun --nproc-per-node 2 examples/prefetching.py

Trains the same model three times: without looking ahead, one batch ahead, and one batch ahead with
rows that may lack the last update. Writes nothing; prints how far outputs differ, and what share of
the exchange went on behind the training.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import shardlab as sl

STEPS, BATCH = 20, 256
ROWS = {"C1": 1_460, "C3": 200_000, "C4": 100_000, "C14": 27}


def train(groups: sl.comm.Groups, depth: int, staleness: int) -> tuple[torch.Tensor, float | None]:
    """The last logits, and the hidden share of the exchange."""
    torch.manual_seed(0)
    tables = [sl.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=16)
              for name, rows in ROWS.items()]
    model, optimizer = sl.shard(
        sl.models.DLRM(sl.EmbeddingBagCollection(tables), 13, bottom_mlp=[64, 16], top_mlp=[64]),
        optimizer=sl.optim.RowWiseAdagrad(lr=0.05), groups=groups)
    world = groups.world_size
    reader = sl.data.build_reader(sl.data.SourceSpec("synthetic_criteo", ROWS), BATCH,
                                  stop=STEPS * BATCH * world, rank=groups.rank, world_size=world)
    # The announced features must be the very object that the model gets: move batches before.
    batches = (batch.to(groups.device) for batch in reader)
    for batch in sl.prefetching(batches, model, lambda batch: batch.sparse, depth=depth,
                                staleness=staleness):
        logits = model(batch.dense, batch.sparse)
        bce(logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits.detach(), model.clock.hidden_share()


def main() -> None:
    """Compares the three ways on whatever ranks there are."""
    groups = sl.comm.init()
    plain, _ = train(groups, depth=0, staleness=0)
    for name, staleness in (("ahead", 0), ("stale", 1)):
        logits, hidden = train(groups, depth=1, staleness=staleness)
        if groups.rank == 0:
            print(f"{name}: logits differ by at most {float((logits - plain).abs().max()):.2e}, "
                  + ("nothing travels" if hidden is None else f"{hidden:.0%} of exchange hidden"))
    if groups.rank == 0:
        print(f"over {groups.transport}")
    sl.comm.shutdown()


if __name__ == "__main__":
    main()
