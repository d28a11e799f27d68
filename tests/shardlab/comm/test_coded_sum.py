"""Sums in a codec: equal on all ranks, within the codec's bound, and as many bytes as counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shardlab import comm
from shardlab.comm.coded_sum import CodedSum, Draw, StagedSum, open_span_sum, start_span_sum
from shardlab.comm.ordered_sum import piece_edges
from shardlab.wire_bytes import SPAN_LIMITS, span_bytes
from tests.harness import run_ranks
from tests.sharded_runs import in_stages

CODECS = sorted(SPAN_LIMITS)
#: What stochastic rounding moves, of the span's largest: docs/wire.md, doubled.
BOUND = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp8": 2.0**-3, "fp8_e5m2": 2.0**-2, "int8": 2 / 113,
         "int4": 2 / 6.2}
#: Spans: none; fewer than ranks; a bucket and one that does not divide.
SIZES = [0, 1, 3, 64, 201]


def _part(rank: int, spans: int, scale: float = 1e-7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + spans)
    return torch.randn(spans, 256, generator=generator) * scale


class _Counting:
    """A lane that counts what it sends to others."""

    def __init__(self, lane, rank):
        self.lane, self.rank, self.sent = lane, rank, 0

    def all_to_all(self, out, source, out_splits, source_splits):
        self.sent += sum(source_splits) - source_splits[self.rank]
        return self.lane.all_to_all(out, source, out_splits, source_splits)


def _sums(groups, codec, transport, rounding="stochastic"):
    """Means of vectors of all sizes, several under way at once; bytes counted, and bytes sent."""
    groups = comm.build_groups(groups.process_group, transport=transport)
    way = open_span_sum(groups, codec, rounding)
    lanes = [_Counting(lane, groups.rank) for lane in (way.scatter, way.gather)]
    way = dataclasses.replace(way, scatter=lanes[0], gather=lanes[1])
    parts = [_part(groups.rank, spans) for spans in SIZES]
    works = [start_span_sum(way, part, Draw(3, 4, 0, 1000 * i), groups)
             for i, part in enumerate(parts)]
    for work in works:
        work.wait()
    return parts, sum(map(way.sent_bytes, SIZES)), lanes[0].sent + lanes[1].sent


@pytest.mark.parametrize(("world", "codec", "transport"), [
    *((2, codec, "shared_memory") for codec in CODECS), (3, "int8", "shared_memory"),
    (2, "int8", "gloo"), (4, "fp16", "gloo")])
def test_means_are_alike_and_within_the_bound(world, codec, transport):
    found = run_ranks(world, _sums, codec, transport)
    for i, spans in enumerate(SIZES):
        parts = torch.stack([_part(rank, spans) for rank in range(world)]).double()
        means, largest = [ranks[0][i] for ranks in found], parts.abs().amax(2).sum(0)
        assert all(torch.equal(mean, means[0]) for mean in means)
        # Once to the owner, of each rank's span; once back, of the sum and its error.
        allowed = BOUND[codec] * (2 + BOUND[codec]) * largest[:, None] / world
        assert bool(((means[0].double() - parts.mean(0)).abs() <= allowed).all())
    for _, counted, sent in found:
        assert counted == sent
    # 2 (W - 1) / W of the encoded bytes, of all ranks together.
    every = sum(counted for _, counted, _ in found)
    assert every == 2 * (world - 1) * sum(SIZES) * span_bytes(codec)


def test_transports_give_the_same_bits():
    runs = [run_ranks(3, _sums, "int8", transport)[1][0] for transport in ("gloo", "shared_memory")]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def _repeated(groups, draws):
    way = open_span_sum(groups, "int4", "stochastic")
    found = []
    for draw in draws:
        part = _part(groups.rank, 5)
        start_span_sum(way, part, draw, groups).wait()
        found.append(part)
    return found


def test_bits_follow_from_seed_step_backward_and_span():
    base = Draw(1, 2, 3, 4)
    draws = [base, base, *(dataclasses.replace(base, **{name: 9})
                           for name in ("seed", "step", "number", "first_span"))]
    first, again, *others = run_ranks(2, _repeated, draws)[0]
    assert torch.equal(first, again)
    for index, other in enumerate(others):
        assert not any(torch.equal(other, known) for known in (first, *others[:index]))


def test_ranks_and_directions_draw_apart():
    draw = Draw(1, 2, 3)
    keys = {draw.rounding(rank, back, 0, True).key for rank in range(4) for back in (False, True)}
    assert len(keys) == 8
    assert draw.at(10).rounding(0, False, 5, True).row_start == 15


def _mean_of_many(groups, trials):
    way = open_span_sum(groups, "int8", "stochastic")
    total = torch.zeros(1, 256, dtype=torch.float64)
    for trial in range(trials):
        part = _part(groups.rank, 1)
        start_span_sum(way, part, Draw(step=trial), groups).wait()
        total += part
    return total / trials


def test_the_sum_is_unbiased():
    trials = 400
    mean = run_ranks(2, _mean_of_many, trials)[0]
    parts = torch.stack([_part(rank, 1) for rank in range(2)]).double()
    step = parts.abs().amax() * BOUND["int8"]
    assert bool(((mean - parts.mean(0)).abs() <= 6 * step / trials**0.5).all())


def _with_bad(groups, bad):
    way = open_span_sum(groups, "fp16", "stochastic")
    part = torch.ones(4, 256)
    if groups.rank == 1:
        part[0, 7], part[3, 255] = bad, bad  # the first span is rank 0's to add up
    start_span_sum(way, part, Draw(), groups).wait()
    return part


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_all(bad):
    for part in run_ranks(2, _with_bad, bad):
        assert part.isnan().all(1).tolist() == [True, False, False, True]
        assert bool((part[1:3] == 1).all())


def _staged(groups, codec):
    groups = in_stages(groups)
    way = open_span_sum(groups, codec, "stochastic")
    assert isinstance(way, StagedSum)
    lanes = [_Counting(lane, groups.stages.host) for lane in (way.hosts.scatter, way.hosts.gather)]
    way = dataclasses.replace(way, hosts=dataclasses.replace(way.hosts, scatter=lanes[0],
                                                             gather=lanes[1]))
    parts = [_part(groups.rank, spans) for spans in SIZES]
    for work in [start_span_sum(way, part, Draw(3, 4, 0, 1000 * i), groups)
                 for i, part in enumerate(parts)]:
        work.wait()
    return parts, sum(lane.sent for lane in lanes), sum(map(way.sent_bytes, SIZES))


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_two_stages_round_between_hosts_alone(codec):
    found = run_ranks(4, _staged, codec)
    for i, spans in enumerate(SIZES):
        parts = torch.stack([_part(rank, spans) for rank in range(4)]).double()
        hosts = parts.view(2, 2, spans, 256).sum(1)
        allowed = BOUND[codec] * (2 + BOUND[codec]) * hosts.abs().amax(2).sum(0)[:, None] / 4
        assert all(torch.equal(ranks[0][i], found[0][0][i]) for ranks in found)
        assert bool(((found[0][0][i].double() - parts.mean(0)).abs() <= allowed + 1e-14).all())
    across = sum(sent for _, sent, _ in found)
    assert across == 2 * sum(SIZES) * span_bytes(codec)  # one host's encoded bytes, both ways
    inside = 2 * 2 * sum(SIZES) * 256 * 4
    assert sum(counted for *_, counted in found) == across + inside


def test_pieces_of_a_coded_sum_cover_all_spans():
    for world in (2, 3, 8):
        ways = [CodedSum(None, None, rank, world, "int8", True) for rank in range(world)]
        assert piece_edges(100, world)[-1] == 100
        assert sum(way.sent_bytes(100) for way in ways) == 2 * (world - 1) * 100 * 258


def _failing(groups):
    groups = comm.build_groups(groups.process_group, transport="gloo", timeout_s=1)
    way = open_span_sum(groups, "int8", "stochastic")
    if groups.rank == 0:
        with pytest.raises(Exception, match="dense: all_reduce failed on rank 0 of 2: no answer "
                                            "within 1 s; rank 1"):
            start_span_sum(way, _part(0, 8), Draw(), groups).wait()
    else:
        import time

        time.sleep(2)
    return True


def test_a_late_rank_is_named():
    assert run_ranks(2, _failing) == [True, True]
