"""Dense gradients over ranks: means, whatever each rank's loss touches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardlab as sl
from shardlab import comm
from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.sharded.dense import DenseReducer
from shardlab.table_plan import DenseWire
from tests.harness import run_ranks
from tests.sharded_runs import in_stages


class Net(nn.Module):
    """Three layers, of which a call names those to use; the first fills a bucket of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(600, 700)
        self.left = nn.Linear(700, 3)
        self.right = nn.Linear(700, 3).double()

    def forward(self, x: torch.Tensor, use: str) -> torch.Tensor:
        hidden = self.wide(x)
        out = hidden.sum(dim=1).double() * 1e-3
        if "l" in use:
            out = out + self.left(hidden).sum(dim=1)
        if "r" in use:
            out = out + self.right(hidden.double()).sum(dim=1)
        return out


def _inputs(rank: int) -> torch.Tensor:
    return torch.randn(5, 600, generator=torch.Generator().manual_seed(rank + 10))


def _plain(uses: list[str]) -> dict[str, torch.Tensor | None]:
    """Gradients of the mean of all ranks' losses, in one process."""
    torch.manual_seed(0)
    net = Net()
    losses = [net(_inputs(rank), use).square().sum() for rank, use in enumerate(uses) if use]
    (sum(losses) / len(uses)).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def _reduced(groups, uses: list[str], passes: int = 1,
             codec: str = "fp32") -> dict[str, torch.Tensor | None]:
    torch.manual_seed(groups.rank)  # ranks start apart: rank 0's parameters count
    net = Net()
    reducer = DenseReducer(net, groups, DenseWire(codec))
    use = uses[groups.rank]
    for _ in range(passes):
        if use:
            net(_inputs(groups.rank), use).square().sum().backward()
    reducer.settle()
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("uses", [["lr", "lr"], ["l", "r"], ["l", "l"], ["lr", ""],
                                  ["l", "lr", "r", ""]], ids=str)
def test_gradients_are_means_over_ranks(uses):
    plain = _plain(uses)
    for found in run_ranks(len(uses), _reduced, uses):
        assert {name for name, grad in found.items() if grad is None} == {
            name for name, grad in plain.items() if grad is None}
        for name, gradient in plain.items():
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, rtol=2e-5, atol=1e-6)


def test_ranks_agree_in_every_bit():
    first, second = run_ranks(2, _reduced, ["lr", "lr"])
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])


def test_backward_passes_add_up():
    plain = _plain(["lr", "l"])
    for found in run_ranks(2, _reduced, ["lr", "l"], 3):
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], 3 * gradient, rtol=5e-5, atol=1e-5)


def _steps_from(groups, skip: int) -> list[torch.Tensor]:
    """Gradients of steps, after ``skip`` steps that a killed run would have taken before."""
    torch.manual_seed(0)
    net = Net()
    reducer = DenseReducer(net, groups)
    gradients = []
    for step in range(skip, 3):
        net.zero_grad()
        net(_inputs(groups.rank + 2 * step), "l").square().sum().backward()
        reducer.settle()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()
                                    if p.grad is not None]))
    return gradients


def test_a_step_does_not_depend_on_those_before():
    whole, resumed = (run_ranks(4, _steps_from, skip)[1] for skip in (0, 2))
    assert torch.equal(whole[2], resumed[0])


def _buffers_of(groups) -> tuple[torch.Tensor, int, torch.Tensor]:
    torch.manual_seed(groups.rank)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    net.register_buffer("flags", torch.tensor([groups.rank == 0, groups.rank == 1]))
    reducer = DenseReducer(net, groups)
    net(torch.randn(8, 4))
    reducer.share_buffers()
    return net[0].running_mean, int(net[0].num_batches_tracked), net.flags


def test_buffers_are_rank_0s():
    (mean, count, flags), (other, other_count, other_flags) = run_ranks(2, _buffers_of)
    assert torch.equal(mean, other)
    assert mean.any()
    assert (count, other_count) == (1, 1)
    assert flags.tolist() == other_flags.tolist() == [True, False]


def _unlike(groups) -> None:
    DenseReducer(nn.Linear(4, 2 + groups.rank), groups)


def test_different_models_are_named():
    with pytest.raises(Exception, match=r"dense parameters differ: rank \d has weight \[\d, 4\]"):
        run_ranks(2, _unlike)


def _sparse(groups) -> None:
    net = nn.Embedding(5, 2, sparse=True)
    DenseReducer(net, groups)
    net(torch.tensor([1])).sum().backward()


def test_sparse_gradients_are_refused():
    with pytest.raises(Exception, match="hold tables in an EmbeddingBagCollection"):
        run_ranks(2, _sparse)


# ---------------------------------------------------------------- in a codec
#: What rounding moves, of the largest of 256 elements: once on the way there, once back.
BOUND = {"bf16": 2.0**-6, "fp16": 2.0**-9, "int8": 4 / 113}


def _assert_near(found: dict, plain: dict, bound: float, passes: int = 1) -> None:
    assert {name for name, grad in found.items() if grad is None} == {
        name for name, grad in plain.items() if grad is None}
    for name, gradient in plain.items():
        if gradient is not None:
            off = (found[name] - passes * gradient).abs().max()
            # Ranks' own gradients may be larger than their mean, but not by much here.
            assert off <= 3 * passes**2 * bound * gradient.abs().max(), name


@pytest.mark.parametrize(("uses", "codec"), [
    (["lr", "lr"], "bf16"), (["l", "r"], "int8"), (["l", "l"], "fp16"), (["lr", ""], "int8"),
    (["l", "lr", "r", ""], "bf16")], ids=str)
def test_coded_gradients_are_means_within_the_bound(uses, codec):
    plain, found = _plain(uses), run_ranks(len(uses), _reduced, uses, 1, codec)
    for one in found:
        _assert_near(one, plain, BOUND[codec])
        for name, gradient in one.items():
            assert gradient is None or torch.equal(gradient, found[0][name])


def test_coded_backward_passes_add_up():
    for found in run_ranks(2, _reduced, ["lr", "l"], 3, "fp16"):
        _assert_near(found, _plain(["lr", "l"]), BOUND["fp16"], 3)


def _bad_gradient(groups) -> tuple[bool, bool]:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    reducer = DenseReducer(net, groups, DenseWire("fp16"))
    net[0](torch.full((1, 3), float("inf") if groups.rank else 1.0)).sum().backward()
    reducer.settle()
    return bool(net[0].weight.grad.isnan().all()), bool(net[0].bias.grad.isfinite().all())


def test_a_gradient_that_is_not_finite_is_none_on_any_rank():
    assert run_ranks(2, _bad_gradient) == [(True, True)] * 2


def _bytes_of(groups, codec: str) -> tuple[int, int]:
    torch.manual_seed(0)
    net = Net().float()
    reducer = DenseReducer(net, groups, DenseWire(codec))
    for _ in range(2):
        net(_inputs(groups.rank), "l").square().sum().backward()
        reducer.settle()
    return reducer.coded_bytes, sum(p.numel() for p in net.parameters())


def test_coded_bytes_are_counted():
    counted, parameters = run_ranks(2, _bytes_of, "int8")[0]
    # 258 bytes for 256 elements, both ways, of half of them each; six parameters, each filled up
    # to a span and marked.
    assert 0 <= counted / 2 - parameters * 258 / 256 <= 6 * 258 + 6 * 4
    assert run_ranks(2, _bytes_of, "fp32")[0][0] == 0


def _complex(groups) -> None:
    net = nn.Module()
    net.phases = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    DenseReducer(net, groups, DenseWire("int8"))


def test_parameters_that_no_codec_holds_are_refused():
    with pytest.raises(Exception, match=r"parameter phases is torch.complex64, and"):
        run_ranks(2, _complex)


class Ranker(nn.Module):
    """A table and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([sl.EmbeddingBagConfig(50, 8, "t", ("t",))])
        self.top = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 1))

    def forward(self, features: object) -> torch.Tensor:
        return self.top(self.ebc(features).values()).squeeze(1)


def _sharded(groups, codec: str, rounding: str = "stochastic"):
    torch.manual_seed(0)
    model = Ranker()
    plan = sl.simple_plan(list(model.ebc.tables), groups).with_dense_wire(codec, rounding)
    return sl.shard(model, plan, groups=groups, seed=3,
                    dense_optimizer=lambda p: torch.optim.SGD(p, lr=0.1))


def _step(model, optimizer, number: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(7 * number + rank)
    ids = torch.randint(50, (64,), generator=generator)
    optimizer.zero_grad()
    loss = (model(sl.KeyedJaggedTensor(["t"], ids, fixed_length=1)) - (ids % 5)).square().mean()
    loss.backward()
    optimizer.step()


def _weights(model) -> torch.Tensor:
    return torch.cat([p.detach().view(-1) for p in model.module.top.parameters()])


def _trained(groups, cases) -> list[torch.Tensor]:
    """Dense weights after 6 steps by (codec, rounding, transport)."""
    found = []
    for codec, rounding, transport in cases:
        ranks = in_stages(groups) if transport == "stages" else \
            comm.build_groups(groups.process_group, transport=transport)
        model, optimizer = _sharded(ranks, codec, rounding)
        for number in range(6):
            _step(model, optimizer, number, groups.rank)
        found.append(_weights(model))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_training_in_a_codec_stays_near_fp32(world):
    cases = [("fp32", "stochastic", "auto"), ("fp16", "stochastic", "auto"),
             ("int8", "nearest", "auto"), ("int8", "stochastic", "gloo"),
             ("int8", "stochastic", "auto")]
    if world == 4:
        cases.append(("int8", "stochastic", "stages"))
    ranks = run_ranks(world, _trained, cases)
    plain = ranks[0][0]
    start = torch.cat([p.detach().view(-1) for p in _fresh_layers()])
    way = float((plain - start).abs().max())
    for number, (codec, rounding, _) in enumerate(cases):
        assert all(torch.equal(found[number], ranks[0][number]) for found in ranks)
        off = float((ranks[0][number] - plain).abs().max())
        assert (off == 0) == (codec == "fp32" or world == 1), (codec, rounding)
        assert off <= 6 * (0.003 if codec == "fp16" else 0.05) * way, (codec, rounding, off, way)
    assert torch.equal(ranks[0][3], ranks[0][4])  # whatever carries the bytes


def _fresh_layers() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return list(Ranker().top.parameters())


def _resumed(groups, stop: int) -> torch.Tensor:
    """Weights after 6 steps, with all state handed to a new model after ``stop`` of them."""
    model, optimizer = _sharded(groups, "int4")
    for number in range(6):
        if number == stop:
            # A batch that is left out takes no random bits with it.
            model(sl.KeyedJaggedTensor(["t"], torch.tensor([1]), fixed_length=1)).sum().backward()
            optimizer.skip_step()
            fresh, other = _sharded(groups, "int4")
            fresh.load_state_dict(model.state_dict())
            chunks = list(model.collections()["ebc"].chunks())
            other.load_state_dict(optimizer.state_dict())
            for chunk in chunks:
                fresh.collections()["ebc"].load_chunk(chunk)
            model, optimizer = fresh, other
        _step(model, optimizer, number, groups.rank)
    return _weights(model)


def test_a_resumed_run_has_the_same_bits():
    whole, resumed = (run_ranks(2, _resumed, stop)[0] for stop in (99, 4))
    assert torch.equal(whole, resumed)


def test_plans_keep_the_codec_and_refuse_others():
    plan = ShardingPlan(2, ()).with_dense_wire("int8", "nearest")
    assert ShardingPlan.from_json(plan.to_json()) == plan
    assert ShardingPlan.from_json(plan.to_json()).with_replicas(2).dense_wire.codec == "int8"
    with pytest.raises(PlanError, match=r"dense_wire.codec: unknown codec 'int9' .did you mean "):
        plan.with_dense_wire("int9")
    with pytest.raises(PlanError, match=r"dense_wire.rounding: unknown 'up'; known: "):
        plan.with_dense_wire("int8", "up")
