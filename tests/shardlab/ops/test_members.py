"""Members of a list: both faces against Python sets."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.members import mark_members, mark_members_reference

FACES = pytest.mark.parametrize("mark", [mark_members, mark_members_reference],
                                ids=["chosen", "reference"])


@FACES
@pytest.mark.parametrize(("keys", "members"), [
    ([], []), ([], [1]), ([0, 1], []), ([0], [0]), ([5, 5, 0], [5, 5]),
    ([2**62, 2**40, 7], [2**62, 8])], ids=str)
def test_small_lists(mark, keys, members):
    found = mark(torch.tensor(keys, dtype=torch.int64), torch.tensor(members, dtype=torch.int64))
    assert found.dtype == torch.bool
    assert found.tolist() == [key in members for key in keys]


@FACES
@pytest.mark.parametrize("step", [1, 64, 1 << 32])
def test_many_keys_with_repetitions(mark, step, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(5000, (4000,), generator=generator) * step
    members = torch.randint(5000, (3000,), generator=generator) * step
    there = set(members.tolist())
    assert mark(keys, members).tolist() == [key in there for key in keys.tolist()]
