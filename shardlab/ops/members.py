"""Which keys occur in another list: rows of the next batch that an earlier one still changes."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.registry import face_of, native


def mark_members(keys: Tensor, members: Tensor) -> Tensor:
    """Tells for every key whether it is a member.

    Args:
        keys: int64 [n], not negative; may repeat.
        members: int64 [m], not negative; may repeat.

    Returns:
        bool [n].
    """
    if face_of("mark_members", keys.device.type) == "native":
        keys, members = keys.contiguous(), members.contiguous()
        found = torch.empty(keys.numel(), dtype=torch.bool)
        native().mark_members(keys.data_ptr(), keys.numel(), members.data_ptr(), members.numel(),
                              found.data_ptr())
        return found
    return mark_members_reference(keys, members)


def mark_members_reference(keys: Tensor, members: Tensor) -> Tensor:
    """The same in plain torch."""
    return torch.isin(keys, members)
