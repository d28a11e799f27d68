"""A tensor-train model in fp64, written from the formulas: cores under torch.optim.

Nothing comes from shardlab's arithmetic: rows by einsum over the logical cores, gradients by
autograd, steps by torch.optim (and by hand for the row-wise rules, whose "row" is a slice).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tests.oracle import Batch, PlainOptimizer, _flatten


def logical_cores(numbers: Sequence[int], cores: Sequence[Tensor]) -> list[Tensor]:
    """Cores as [p, r, q, r] from how a checkpoint holds them.

    Args:
        numbers: cores, row factors, column factors, ranks.
        cores: [p, elements] each; the last one with its columns first.
    """
    count = numbers[0]
    rows, columns = numbers[1:1 + count], numbers[1 + count:1 + 2 * count]
    ranks = numbers[1 + 2 * count:]
    found = [core.reshape(p, ranks[k], q, ranks[k + 1])
             for k, (core, p, q) in enumerate(zip(cores[:-1], rows, columns, strict=False))]
    last = cores[-1].reshape(rows[-1], columns[-1], ranks[-2], 1).transpose(1, 2)
    return [*found, last]


def whole_table(cores: Sequence[Tensor]) -> Tensor:
    """[product of p, product of q]: the table that the cores make."""
    table = cores[0]
    for core in cores[1:]:
        a, _, b, _ = table.shape
        p, _, q, r = core.shape
        table = torch.einsum("arbs,psqt->aprbqt", table, core).reshape(a * p, 1, b * q, r)
    return table.reshape(table.shape[0], -1)


def rate_of(table: object, number: int, core: Tensor, optimizer: PlainOptimizer) -> float:
    """Learning rate of a core: balanced where the start is isometric and the rule normalises."""
    spec = table.storage
    rate = optimizer.lr * spec.lr_scale
    if spec.init != "isometric" or optimizer.kind == "sgd":
        return rate
    pace = 3 if number == spec.cores // 2 else 1
    return rate * pace * (table.embedding_dim / core[0].numel()) ** 0.5


class TrainOracle:
    """Tables of tensor trains, whole.

    Args:
        tables: table configs by name.
        cores: logical cores by table name.
        optimizer: what `step` does, on whole cores.
    """

    def __init__(self, tables: Mapping[str, object], cores: Mapping[str, Sequence[Tensor]],
                 optimizer: PlainOptimizer) -> None:
        self.tables, self.plain = tables, optimizer
        self.cores = {name: [nn.Parameter(core.double().clone()) for core in found]
                      for name, found in cores.items()}
        parameters = [core for found in self.cores.values() for core in found]
        self.rates = {id(core): rate_of(tables[name], number, core, optimizer)
                      for name, found in self.cores.items() for number, core in enumerate(found)}
        groups = [{"params": [core], "lr": self.rates[id(core)]} for core in parameters]
        makers = {"sgd": lambda: torch.optim.SGD(groups, weight_decay=optimizer.weight_decay),
                  "adagrad": lambda: torch.optim.Adagrad(groups, eps=optimizer.eps),
                  "adam": lambda: torch.optim.Adam(groups, betas=optimizer.betas,
                                                   eps=optimizer.eps)}
        self.torch = makers[optimizer.kind]() if optimizer.kind in makers else None
        self.sums = {id(core): torch.zeros(core.shape[0], 1, 1, 1, dtype=torch.float64)
                     for core in parameters}
        self.moments = {id(core): torch.zeros_like(core) for core in parameters}
        self.steps = 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Pooled vectors of every feature."""
        out = {}
        for name, table in self.tables.items():
            rows = whole_table(self.cores[name])
            for feature in table.feature_names:
                ids, offsets, scale = _flatten(batch[feature], table, torch.float64)
                out[feature] = nn.functional.embedding_bag(
                    ids, rows, offsets, mode="sum", per_sample_weights=scale,
                    include_last_offset=True)
        return out

    def step(self) -> None:
        """One step on whole cores."""
        self.steps += 1
        if self.torch is not None:
            self.torch.step()
            self.torch.zero_grad()
            return
        opt = self.plain
        for core in (core for found in self.cores.values() for core in found):
            grad, core.grad = core.grad, None
            square = grad.square().mean((1, 2, 3), keepdim=True)
            with torch.no_grad():
                if opt.kind == "row_wise_adagrad":
                    self.sums[id(core)] += square
                    core -= self.rates[id(core)] * grad / (self.sums[id(core)].sqrt() + opt.eps)
                else:
                    beta1, beta2 = opt.betas
                    first, second = self.moments[id(core)], self.sums[id(core)]
                    first.mul_(beta1).add_((1 - beta1) * grad)
                    second.mul_(beta2).add_((1 - beta2) * square)
                    root = (second / (1 - beta2**self.steps)).sqrt() + opt.eps
                    core -= self.rates[id(core)] * first / (1 - beta1**self.steps) / root
