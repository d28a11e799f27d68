"""Every rank's JSON-able value on every rank."""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """What of `shardlab.comm.Groups` it takes to gather."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Of all ranks; None in a world of one."""

    @property
    def device(self) -> torch.device:
        """That the group's collectives take."""

    @property
    def world_size(self) -> int:
        """How many ranks."""


def gather_json(value: Any, groups: Ranks) -> list[Any]:
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
