"""Dense gradients over ranks: means, whatever each rank's loss touches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardlab.sharded.dense import DenseReducer
from tests.harness import run_ranks


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


def _reduced(groups, uses: list[str], passes: int = 1) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(groups.rank)  # ranks start apart: rank 0's parameters count
    net = Net()
    reducer = DenseReducer(net, groups)
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
