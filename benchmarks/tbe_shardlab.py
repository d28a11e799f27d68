"""ShardLab's column of tbe_cpu.py, and the proof that it computes what FBGEMM computes."""

from __future__ import annotations

import numpy as np
import torch
from tbe_cases import LEARNING_RATE, Case, Step
from tbe_peers import build_fbgemm

import shardlab as sl
from shardlab.ops.allocator import keep_freed_memory
from shardlab.sharded import ShardedEmbeddingBagCollection, ShardedOptimizer, simple_plan

_EPS = 1e-8


class ShardLab(Step):
    """A sharded collection in a world of one: input checks, routing, autograd and optimizer in.

    The allocator keeps freed memory, as ShardLab's trainer has it.
    """

    def __init__(self, case: Case, dtype: str, optimizer: str):
        assert dtype == "fp32", dtype
        keep_freed_memory()
        torch.manual_seed(0)
        rule = {"sgd": sl.optim.SGD(lr=LEARNING_RATE), "adam": sl.optim.Adam(lr=LEARNING_RATE),
                "adagrad": sl.optim.Adagrad(lr=LEARNING_RATE, eps=_EPS),
                "rowwise_adagrad": sl.optim.RowWiseAdagrad(lr=LEARNING_RATE, eps=_EPS)}[optimizer]
        tables = [sl.EmbeddingBagConfig(rows, case.dim, f"t{i}", weight_init_min=-0.01,
                                        weight_init_max=0.01) for i, rows in enumerate(case.rows)]
        groups = sl.comm.init()
        self.table = ShardedEmbeddingBagCollection(tables, simple_plan(tables, groups), groups,
                                                   rule.kind)
        self.optimizer = ShardedOptimizer([self.table], rule, None, groups)
        self.names, self.pooling = [table.name for table in tables], case.pooling
        self.grad = torch.randn(case.batch, len(case.rows) * case.dim) * 1e-2

    def prepare(self, ids: np.ndarray):
        return sl.KeyedJaggedTensor(self.names, torch.from_numpy(ids).view(-1),
                                    fixed_length=self.pooling)

    def forward(self, batch):
        return self.table(batch).values()

    def backward(self, output) -> None:
        output.backward(self.grad)
        self.optimizer.step()


def assert_equal_to_fbgemm(optimizer: str) -> None:
    """Three steps of both from the same weights; FBGEMM has no Adam on CPU, which tests cover."""
    if optimizer == "adam":
        return
    case = Case((50, 700, 3), 16, 64, 3)
    ours = ShardLab(case, "fp32", optimizer)
    theirs = build_fbgemm(case, "fp32", optimizer)
    start = {chunk.table: chunk.weights for chunk in ours.table.chunks()}
    for i, weight in enumerate(theirs.split_embedding_weights()):
        weight.data.copy_(start[f"t{i}"])
    offsets = torch.arange(0, len(case.rows) * case.batch * case.pooling + 1, case.pooling)
    rng = np.random.default_rng(0)
    for _ in range(3):
        ids = np.stack([rng.integers(0, rows, case.batch * case.pooling) for rows in case.rows])
        mine = ours.forward(ours.prepare(ids))
        other = theirs(torch.from_numpy(ids).view(-1), offsets)
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        ours.backward(mine)
        other.backward(ours.grad)
    after = {chunk.table: chunk.weights for chunk in ours.table.chunks()}
    for i, weight in enumerate(theirs.split_embedding_weights()):
        torch.testing.assert_close(after[f"t{i}"], weight, rtol=1e-5, atol=1e-6)
