"""Learning-rate schedules, gradient clipping and gradient accumulation, all of them torch's way.

    python examples/lr_schedule.py

The optimiser that `shardlab.shard` returns is a torch.optim.Optimizer. Its first param group holds
the tables' hyper-parameters, the groups of the dense optimiser follow.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import shardlab as sl

STEPS, WARMUP, MICRO_BATCHES = 60, 10, 2
ROWS = {"C1": 1_460, "C2": 583, "C9": 3, "C14": 27}


def main() -> None:
    """Trains with a warm-up and a cosine decay of both learning rates."""
    torch.manual_seed(0)
    tables = [sl.EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=8)
              for name, rows in ROWS.items()]
    model = sl.models.DCN(sl.EmbeddingBagCollection(tables), 13, deep_mlp=[64])
    # clip_norm bounds the norm of all rows' gradients of a step together, over all ranks;
    # clip_value then bounds every element.
    model, optimizer = sl.shard(
        model, optimizer=sl.optim.Adagrad(lr=0.1, clip_norm=1.0, clip_value=0.5),
        dense_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9))
    schedule = SequentialLR(
        optimizer, milestones=[WARMUP], schedulers=[
            LinearLR(optimizer, start_factor=0.1, total_iters=WARMUP),
            CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP, eta_min=1e-3)])

    reader = sl.data.build_reader(sl.data.SourceSpec("synthetic_criteo", ROWS), batch_size=512,
                                  stop=512 * STEPS * MICRO_BATCHES)
    batches = iter(reader)
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(MICRO_BATCHES):  # gradients add up until step(), for rows as for weights
            batch = next(batches).to(model.groups.device)
            loss = binary_cross_entropy_with_logits(model(batch.dense, batch.sparse), batch.labels)
            (loss / MICRO_BATCHES).backward()
            total += loss.item() / MICRO_BATCHES
        # The dense gradients are where torch puts them; tables are no parameters of the model.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            rates = ", ".join(f"{group['lr']:.4f}" for group in optimizer.param_groups)
            print(f"step {step + 1}: loss {total:.3f}, lr of tables, dense: {rates}")


if __name__ == "__main__":
    main()
