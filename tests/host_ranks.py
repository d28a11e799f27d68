"""What ranks on several hosts run in the tests: exchanges, then training flat and in two stages."""

from __future__ import annotations

import sys

import torch

from shardlab import comm
from shardlab.errors import ExchangeError


def train(groups: comm.Groups) -> None:
    """Trains a table flat and in two stages; prints how far apart rows are, and bytes."""
    import shardlab as sl
    from shardlab.plan import ShardingPlan
    from shardlab.specs import EmbeddingBagConfig, ShardingType
    from shardlab.table_plan import build_table_plan

    table = EmbeddingBagConfig(300, 8, "t")
    world = groups.world_size
    plan = ShardingPlan(world, (build_table_plan(table, ShardingType.ROW_WISE, range(world)),))
    ids = torch.arange(200) + 10 * groups.rank
    features = sl.KeyedJaggedTensor(["t"], ids, fixed_length=1)
    found, across = [], []
    for ranks in (groups, comm.with_stages(groups)):
        torch.manual_seed(0)
        model, optimizer = sl.shard(Tables(sl.EmbeddingBagCollection([table])), plan, groups=ranks,
                                    optimizer=sl.optim.SGD(lr=0.5))
        for _ in range(3):
            optimizer.zero_grad()
            (model(features).values() - 1).square().sum().backward()
            optimizer.step()
        found.append(model(features).values().detach())
        sent = torch.tensor(model.collections()["ebc"].wire.across_bytes)
        across.append(int(comm.all_reduce_(sent, groups)))
    apart = float((found[0] - found[1]).abs().max())
    print(f"rank {groups.rank}: {ranks.transport}; rows at most {apart:.1e} apart; "
          f"fewer bytes across: {across[1] < 0.6 * across[0]}")


class Tables(torch.nn.Module):
    """Nothing but tables."""

    def __init__(self, ebc: torch.nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: object) -> object:
        return self.ebc(features)


def main() -> None:
    timeout_s, forever = float(sys.argv[1]), sys.argv[2] == "forever"
    groups = comm.init(timeout_s)
    world = groups.world_size
    splits = [250] * world
    source = torch.full((250 * world,), float(groups.rank))
    try:
        while True:
            out = torch.empty_like(source)
            comm.all_to_all(out, source, splits, splits, groups, "rows").wait()
            if not forever:
                break
    except ExchangeError as error:
        print(f"error: {error}", flush=True)
        sys.exit(3)
    print(f"rank {groups.rank} got {sorted(set(out.tolist()))} over {groups.transport}")
    comm.barrier(groups)
    train(groups)
    comm.shutdown()


if __name__ == "__main__":
    main()
