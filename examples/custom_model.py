"""Any nn.Module can hold tables: two towers, a collection in each, trained on in-batch negatives.

    python examples/custom_model.py

`shardlab.shard` finds every EmbeddingBagCollection wherever it hangs in a module and leaves the
rest alone: no tracing, no base class. All that is not a table is trained by a torch optimiser,
replicated, its gradients averaged over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

import shardlab as sl

BATCH, STEPS, GROUPS = 256, 120, 40
Bags = Mapping[str, tuple[Tensor, Tensor]]  # feature -> (ids, ids per sample)


class Tower(nn.Module):
    """Pools a few features and projects them to a unit vector."""

    def __init__(self, tables: list[sl.EmbeddingBagConfig], columns: int) -> None:
        super().__init__()
        self.tables = sl.EmbeddingBagCollection(tables)
        width = sum(table.embedding_dim * len(table.feature_names) for table in tables)
        self.project = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, columns))

    def forward(self, features: Bags) -> Tensor:
        """[B, columns]."""
        return functional.normalize(self.project(self.tables(features).values()), dim=1)


class TwoTowers(nn.Module):
    """Scores every user of a batch against every item of it."""

    def __init__(self) -> None:
        super().__init__()
        table = sl.EmbeddingBagConfig
        self.users = Tower([
            table(name="user", num_embeddings=4_000, embedding_dim=32),
            table(name="seen", num_embeddings=1_000, embedding_dim=16, pooling="mean"),
        ], columns=24)
        self.items = Tower([
            table(name="item", num_embeddings=1_000, embedding_dim=32),
            table(name="maker", num_embeddings=50, embedding_dim=8),
        ], columns=24)
        self.sharpness = nn.Parameter(torch.tensor(5.0))

    def forward(self, users: Bags, items: Bags) -> Tensor:
        """[B, B] logits; the item of user i is item i."""
        return self.sharpness * self.users(users) @ self.items(items).T


def batch_of(generator: torch.Generator) -> tuple[Bags, Bags, Tensor]:
    """Users of group g take items of group g; the last value is each sample's group."""
    group = torch.randint(GROUPS, (BATCH,), generator=generator)
    one = torch.ones(BATCH, dtype=torch.int64)

    def ids(rows: int, of_group: Tensor) -> Tensor:
        return of_group + GROUPS * torch.randint(rows // GROUPS, of_group.shape,
                                                 generator=generator)

    sizes = torch.randint(4, (BATCH,), generator=generator)  # a user may have seen nothing yet
    seen = ids(1_000, group.repeat_interleave(sizes))
    users = {"user": (ids(4_000, group), one), "seen": (seen, sizes)}
    items = {"item": (ids(1_000, group), one), "maker": (group, one)}
    return users, items, group


def main() -> None:
    """Trains, and counts how often a user's best item is of the right group."""
    torch.manual_seed(0)
    model, optimizer = sl.shard(
        TwoTowers(), optimizer=sl.optim.RowWiseAdam(lr=0.02),
        dense_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3))
    print("collections:", ", ".join(model.collections()))
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        users, items, group = batch_of(generator)
        group = group.to(model.groups.device)  # ids are moved by the collections
        optimizer.zero_grad()
        logits = model(users, items)
        same = (group[:, None] == group).float()
        loss = functional.cross_entropy(logits, same / same.sum(1, keepdim=True))
        loss.backward()
        optimizer.step()
        if step % 40 == 39:
            right = (group[logits.argmax(1)] == group).float().mean()
            print(f"step {step + 1}: loss {loss:.3f}, right group {right:.1%}")


if __name__ == "__main__":
    main()
