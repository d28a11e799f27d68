"""Every rank's JSON-able value on every rank."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from shardlab.comm.groups import Groups


def gather_json(value: Any, groups: Groups) -> list[Any]:
    """Every rank's value, by rank, on every rank; uses the process group alone."""
    text = json.dumps(value).encode()
    if groups.process_group is None:
        return [json.loads(text)]
    size = torch.tensor([len(text)], device=groups.device)
    dist.all_reduce(size, dist.ReduceOp.MAX, group=groups.process_group)
    mine = torch.full((int(size),), ord(" "), dtype=torch.uint8, device=groups.device)
    mine[:len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(groups.device)
    parts = [torch.empty_like(mine) for _ in range(groups.world_size)]
    dist.all_gather(parts, mine, group=groups.process_group)
    return [json.loads(bytes(part.cpu().tolist())) for part in parts]
