"""A TorchRec training script, ported: the TorchRec line stands above each line that replaces it.

    python examples/torchrec_user.py
    torchrun --nproc-per-node 2 examples/torchrec_user.py

TorchRec itself is not needed. A TorchRec KeyedJaggedTensor is accepted as it is, so readers that
make them can stay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shardlab as sl

BATCH, STEPS, USERS, ITEMS = 256, 80, 400, 200


class Clicks(nn.Module):
    """Unchanged: a model that calls its collection and reads a KeyedTensor."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc
        self.score = nn.Sequential(nn.Linear(3 * 32, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, features: sl.KeyedJaggedTensor) -> Tensor:
        pooled = self.ebc(features)
        vectors = [pooled[name] for name in ("user", "item", "last_items")]
        return self.score(torch.cat(vectors, dim=1)).squeeze(1)


def click_batch(generator: torch.Generator) -> tuple[sl.KeyedJaggedTensor, Tensor]:
    """Every third item is clicked, more so by even users; `last_items` has 0 to 5 ids."""
    user = torch.randint(USERS, (BATCH,), generator=generator)
    item = torch.randint(ITEMS, (BATCH,), generator=generator)
    sizes = torch.randint(6, (BATCH,), generator=generator)
    history = torch.randint(ITEMS, (int(sizes.sum()),), generator=generator)
    one = torch.ones(BATCH, dtype=torch.int64)
    # torchrec: KeyedJaggedTensor.from_lengths_sync(keys, values, lengths)
    features = sl.KeyedJaggedTensor.from_lengths_sync(
        ["user", "item", "last_items"], torch.cat([user, item, history]),
        torch.cat([one, one, sizes]))
    chance = 0.1 + 0.5 * (item % 3 == 0) + 0.3 * (user % 2 == 0)
    return features, (torch.rand(BATCH, generator=generator) < chance).float()


def main() -> None:
    """Trains for `STEPS` steps."""
    # torchrec: dist.init_process_group("nccl"); device = torch.device("cuda", local_rank)
    groups = sl.comm.init()
    # torchrec: EmbeddingBagCollection(device=torch.device("meta"), tables=[...]) of configs with
    #           the same fields; here, too, no weights exist until `shard` places them
    ebc = sl.EmbeddingBagCollection([
        sl.EmbeddingBagConfig(name="t_user", num_embeddings=USERS, embedding_dim=32,
                              feature_names=["user"], pooling="sum"),
        sl.EmbeddingBagConfig(name="t_item", num_embeddings=ITEMS, embedding_dim=32,
                              feature_names=["item", "last_items"], pooling="mean"),
    ])
    # torchrec: apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.1})
    #           plan = EmbeddingShardingPlanner(topology).collective_plan(model, sharders, group)
    #           model = DistributedModelParallel(model, device=device, plan=plan)
    #           dense = KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(
    #               model.named_parameters())), lambda p: torch.optim.Adam(p, lr=1e-2))
    #           optimizer = CombinedOptimizer([model.fused_optimizer, dense])
    torch.manual_seed(0)  # every rank starts from rank 0's dense parameters
    model, optimizer = sl.shard(
        Clicks(ebc), optimizer=sl.optim.RowWiseAdagrad(lr=0.1),
        dense_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), groups=groups)

    generator = torch.Generator().manual_seed(groups.rank)
    first = last = 0.0
    for step in range(STEPS):
        features, clicks = click_batch(generator)
        # torchrec: tables step inside backward(); here all parameters step in optimizer.step()
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(features),
                                                             clicks.to(groups.device))
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()

    # Features are matched by name in every batch: any order gives the same answer ...
    model.eval()
    with torch.no_grad():
        shuffled = features.permute([2, 0, 1])
        assert torch.equal(model(features), model(shuffled))
    # ... and a wrong name or id is an error that says where; nothing is remapped to row 0.
    try:
        model({"user": (torch.tensor([USERS]), torch.tensor([1])),
               "item": (torch.tensor([7]), torch.tensor([1])),
               "last_items": (torch.tensor([], dtype=torch.int64), torch.tensor([0]))})
    except ValueError as error:  # shardlab.errors.BoundsError
        message = str(error)
    if groups.rank == 0:
        print(f"loss {first:.3f} -> {last:.3f} on {groups.world_size} rank(s)")
        print(message)
    sl.comm.shutdown()


if __name__ == "__main__":
    main()
