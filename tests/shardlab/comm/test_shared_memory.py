"""Lanes through shared memory: any sizes, any order of waits, refusals, and nothing left behind."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardlab import comm
from shardlab.comm import shared_memory
from shardlab.errors import ExchangeError, LaunchError
from tests.harness import run_ranks


def _transfers(groups, seed, biggest, count):
    """Random sizes, several under way at once; every element tells sender, receiver and place."""
    draw, rank, world = random.Random(seed), groups.rank, groups.world_size
    works = []
    for _ in range(count):
        sizes = [[draw.choice([0, 1, 7, draw.randrange(biggest)]) for _ in range(world)]
                 for _ in range(world)]  # by sender, by receiver
        source = torch.cat([torch.arange(n) * 100 + rank * 10 + peer
                            for peer, n in enumerate(sizes[rank])])
        due = [sizes[peer][rank] for peer in range(world)]
        out = torch.full((sum(due),), -1)
        works.append((out, due, comm.all_to_all(out, source, due, sizes[rank], groups)))
        if draw.random() < 0.3:
            works[draw.randrange(len(works))][2].wait()
    for out, due, work in reversed(works):
        work.wait()
        for peer, part in enumerate(out.split(due)):
            assert torch.equal(part, torch.arange(due[peer]) * 100 + peer * 10 + rank)
    return groups.transport


@pytest.mark.parametrize(("world", "biggest"), [(2, 50), (4, 50), (2, 700_000), (3, 300_000)])
def test_transfers_of_all_sizes_arrive(world, biggest):
    for seed in range(3):
        found = run_ranks(world, _transfers, seed, biggest, 12)
        assert found == ["shared memory: all ranks are on one host"] * world


def _large_and_odd(groups, lead, size):
    """A large message that begins and ends anywhere in a cache line; what lies around it stays."""
    rank = groups.rank
    source = torch.randint(0, 100, (2, size), dtype=torch.int8,
                           generator=torch.Generator().manual_seed(3))
    out = torch.full((lead + size + 70,), -1, dtype=torch.int8)
    due = [size if peer != rank else 0 for peer in range(2)]
    comm.all_to_all(out[lead:lead + size], source[rank], due, due, groups).wait()
    assert torch.equal(out[lead:lead + size], source[1 - rank])
    return bool((out[:lead] == -1).all() and (out[lead + size:] == -1).all())


@pytest.mark.parametrize(("lead", "size"), [(0, 4 << 20), (1, (4 << 20) + 3), (67, (5 << 20) - 1)])
def test_large_transfers_may_begin_anywhere(lead, size):
    assert run_ranks(2, _large_and_odd, lead, size) == [True, True]


def _forget(groups):
    """Rank 1 drops a transfer larger than the rings, then does another one."""
    size, rank = 1 << 20, groups.rank
    out, source = torch.full((2 * size,), -1), torch.arange(2 * size) + rank
    work = comm.all_to_all(out, source, [size] * 2, [size] * 2, groups)
    if rank == 1:
        del out, source, work
    others = [torch.full((2 * size,), -1) for _ in range(3)]  # takes up memory that is free
    comm.all_to_all(torch.empty(2), torch.ones(2), [1, 1], [1, 1], groups).wait()
    assert all(bool((other == -1).all()) for other in others)
    return torch.equal(out[size:], torch.arange(size) + 1) if rank == 0 else True


def test_transfer_that_nobody_waits_for_keeps_its_memory():
    assert run_ranks(2, _forget) == [True, True]


def _disagree(groups):
    sent, due = ([0, 3], [0, 4]) if groups.rank == 0 else ([3, 0], [3, 0])
    try:
        comm.all_to_all(torch.empty(sum(due)), torch.ones(sum(sent)), due, sent, groups,
                        "rows").wait()
    except ExchangeError as error:
        return str(error)


def test_ranks_that_disagree_on_sizes_say_so():
    message = run_ranks(2, _disagree)[0]
    assert message.startswith("rows: all_to_all failed on rank 0 of 2: rank 1 sends 12 bytes in "
                              "transfer 1, this rank expects 16")


def _segments(groups):
    """Memory files that this process has open, and names in /dev/shm."""
    fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
           if os.path.islink(f"/proc/self/fd/{fd}")]
    shm = Path("/dev/shm")
    return [name for name in fds if "shardlab-lane" in name], \
        [path.name for path in shm.iterdir() if "shardlab" in path.name] if shm.is_dir() else []


def test_segments_have_no_name_that_could_stay():
    assert run_ranks(2, _segments) == [([], [])] * 2


def _chosen(groups, wanted):
    return comm.build_groups(transport=wanted).transport


def test_gloo_can_be_chosen():
    assert run_ranks(2, _chosen, "gloo") == ["gloo: gloo was asked for"] * 2


def _without_memory(groups, wanted):
    if groups.rank == 1:
        shared_memory.os.memfd_create = _refuse
    try:
        return comm.build_groups(transport=wanted).transport
    except LaunchError as error:
        return str(error)
    finally:
        shared_memory.os.memfd_create = _MEMFD


_MEMFD = getattr(os, "memfd_create", None)


def _refuse(*_):
    raise OSError(12, "Cannot allocate memory")


def test_all_ranks_fall_back_where_one_gets_no_memory(monkeypatch):
    reason = "rank 1 got no shared memory: [Errno 12] Cannot allocate memory"
    for found in run_ranks(2, _without_memory, "auto"):
        assert found == f"gloo: {reason}"
    for rank, found in enumerate(run_ranks(2, _without_memory, "shared_memory")):
        assert found == (f"rank {rank}: shared memory was asked for, but {reason}; use transport "
                         "auto or gloo")


def test_unknown_transport_is_refused():
    with pytest.raises(AssertionError, match="transport 'pigeons' is not one of auto, gloo"):
        run_ranks(2, _chosen, "pigeons")


def _sums(groups, sizes, dtype):
    """Several sums under way at once, waited for in their order; the results as bits."""
    tensors = [(torch.arange(n, dtype=torch.float64) * (groups.rank + 1) / 7).to(dtype)
               for n in sizes]
    works = [comm.start_all_reduce(tensor, groups) for tensor in tensors]
    for work in works:
        work.wait()
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_sums_are_those_of_the_ranks_in_order(world, dtype):
    sizes = [0, 1, 15, 17, 1000, 1_500_001 if world == 2 else 70_001]
    found = run_ranks(world, _sums, sizes, dtype)
    for n, *by_rank in zip(sizes, *found, strict=True):
        terms = [(torch.arange(n, dtype=torch.float64) * (r + 1) / 7).to(dtype)
                 for r in range(world)]
        assert torch.tensor(by_rank[0], dtype=dtype).equal(torch.stack(terms).sum(0))
        assert all(other == by_rank[0] for other in by_rank)


def _scaled_sums(groups, sizes, transport):
    """Means, the first halves of all sums before the first wait; one twice, as it may be."""
    way = groups if transport == "shared" else replace(groups, sums=None)
    tensors = [torch.arange(n, dtype=torch.float32) * (groups.rank + 1) / 7 for n in sizes]
    works = [comm.start_all_reduce(tensor, way, 1 / groups.world_size) for tensor in tensors]
    for work in [*works, works[0]]:
        work.pass_on()
    for work in works:
        work.wait()
    return [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize("transport", ["shared", "gloo"])
def test_scaled_sums_are_passed_on_together(transport):
    sizes = [5, 0, 300_001]
    for found in run_ranks(3, _scaled_sums, sizes, transport):
        for n, mean in zip(sizes, found, strict=True):
            terms = [torch.arange(n, dtype=torch.float32) * (r + 1) / 7 for r in range(3)]
            if transport == "shared":
                assert torch.tensor(mean).equal(torch.stack(terms).sum(0) * (1 / 3))
            else:  # the ring adds in another order
                torch.testing.assert_close(torch.tensor(mean), torch.stack(terms).mean(0))
