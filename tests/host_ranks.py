"""What ranks on several hosts run in the tests: one exchange, or exchanges until they fail."""

from __future__ import annotations

import sys

import torch

from shardlab import comm
from shardlab.errors import ExchangeError


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
    comm.shutdown()


if __name__ == "__main__":
    main()
