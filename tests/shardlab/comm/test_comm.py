"""Groups and collectives, on one rank without a process group and on several with gloo."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from shardlab import comm
from shardlab.errors import LaunchError
from tests.harness import run_ranks

WORLDS = pytest.mark.parametrize("world", [1, 2, 4], ids="ranks_{}".format)


def _place(groups):
    again = comm.init()
    local = comm.build_groups(local_world_size=2)
    return ((groups.rank, groups.world_size, groups.local_rank, groups.local_world_size),
            (again.rank, again.world_size), (local.local_rank, local.local_world_size),
            groups.device.type, groups.process_group is None)


def test_groups_know_their_place():
    for rank, found in enumerate(run_ranks(4, _place)):
        assert found == ((rank, 4, rank, 4), (rank, 4), (rank % 2, 2), "cpu", False)


def test_process_on_its_own_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    groups = comm.init()
    assert (groups.rank, groups.world_size, groups.process_group) == (0, 1, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        groups.rank = 3
    comm.shutdown()


@pytest.mark.parametrize(("name", "other"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_an_environment_is_an_error(name, other, monkeypatch):
    monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(LaunchError, match=f"{name}=2 is set but its partner is not; start ranks"):
        comm.init()


def _collect(groups):
    rank, world = groups.rank, groups.world_size
    number = torch.tensor([float(rank), 1.0])
    reduced = [comm.all_reduce_(number.clone(), groups, op).tolist()
               for op in ("sum", "max", "min")]
    text = comm.broadcast_text("première\n" * 3 if rank == 0 else None, groups)
    empty = comm.broadcast_text("" if rank == 0 else None, groups)
    gathered = comm.gather_objects_json({"rank": rank, "list": ["x"] * rank}, groups)
    comm.barrier(groups)
    return reduced, text, empty, gathered, world


@WORLDS
def test_collectives_agree_on_every_rank(world):
    last = float(world - 1)
    for found in run_ranks(world, _collect):
        reduced, text, empty, gathered, _ = found
        assert reduced == [[world * last / 2, world], [last, 1.0], [0.0, 1.0]]
        assert (text, empty) == ("première\n" * 3, "")
        assert gathered == [{"rank": rank, "list": ["x"] * rank} for rank in range(world)]


def _exchange(groups, dtype):
    """Rank r sends r + 1 elements of value 10 r + s to every other rank s, none to itself."""
    rank, world = groups.rank, groups.world_size
    others = [peer for peer in range(world) if peer != rank]
    sent = [rank + 1 if peer != rank else 0 for peer in range(world)]
    due = [peer + 1 if peer != rank else 0 for peer in range(world)]
    source = torch.tensor([10 * rank + peer for peer in others for _ in range(rank + 1)],
                          dtype=dtype)
    out = torch.full((sum(due),), -1, dtype=dtype)
    comm.all_to_all(out, source, due, sent, groups).wait()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int32], ids=str)
@WORLDS
def test_all_to_all_sends_uneven_pieces(world, dtype):
    for rank, found in enumerate(run_ranks(world, _exchange, dtype)):
        assert found.tolist() == [10 * peer + rank for peer in range(world) if peer != rank
                                  for _ in range(peer + 1)]


def _overlap(groups):
    """Two exchanges under way beside a dense all-reduce, waited for in the other order."""
    outs = [torch.empty(2) for _ in range(2)]
    works = [comm.all_to_all(out, torch.full((2,), float(10 * groups.rank + i)), [1, 1], [1, 1],
                             groups) for i, out in enumerate(outs)]
    total = torch.ones(1)
    dist.all_reduce(total, group=groups.process_group)
    for work in works[::-1]:
        work.wait()
        work.wait()  # a second wait changes nothing
    return [out.tolist() for out in outs], total.item()


def test_exchanges_overlap_with_dense_collectives():
    assert run_ranks(2, _overlap) == [([[0.0, 10.0], [1.0, 11.0]], 2.0)] * 2


def test_wire_bytes_add_up():
    assert comm.WireBytes(1, 20, 300).total == 321
