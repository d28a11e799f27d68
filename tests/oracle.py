"""The judge: an unsharded model of the whole step, written from the formulas.

`nn.EmbeddingBag` per table, autograd, and one plain optimiser step per touched row. Everything is
fp64 unless asked otherwise, nothing is fast, and nothing comes from shardlab's own arithmetic:
only the table descriptions (`shardlab.specs`) are shared.

    oracle = Oracle(tables, weights, PlainOptimizer("adagrad", lr=0.1))
    out = oracle.forward(batch)                  # {feature: [B, D]}, differentiable
    loss(out).backward()
    oracle.step()

A step, for every table: gradients of the whole global batch are summed per row first; the sums
are clipped (by the norm over all tables, then by value); then each row that occurs in the batch
takes one optimiser step. A row that does not occur is untouched, its state included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardlab.specs import BoundsMode, EmbeddingBagConfig, PoolingType


@dataclass
class Bags:
    """One feature of a batch, as nested lists: a list of ids per sample, and maybe weights."""

    ids: list[list[int]]
    weights: list[list[float]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, end: int) -> Bags:
        """Samples [start, end)."""
        weights = self.weights
        return Bags(self.ids[start:end], None if weights is None else weights[start:end])

    @property
    def lengths(self) -> list[int]:
        return [len(bag) for bag in self.ids]


#: A batch: the bags of every feature, all with the same number of samples.
Batch = Mapping[str, Bags]


@dataclass(frozen=True)
class PlainOptimizer:
    """Optimiser kind (a key of `shardlab.specs.OPTIMIZER_STATE`) and its hyper-parameters."""

    kind: str
    lr: float = 0.01
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_value: float | None = None
    clip_norm: float | None = None


@dataclass
class Oracle:
    """All tables, whole, with their optimiser state.

    Args:
        tables: the tables; their sharding, storage and exchange are ignored.
        weights: initial rows by table name, [num_embeddings, embedding_dim].
        optimizer: what `step` does.
        dtype: dtype of all arithmetic.
    """

    tables: Sequence[EmbeddingBagConfig]
    weights: Mapping[str, Tensor]
    optimizer: PlainOptimizer
    dtype: torch.dtype = torch.float64
    steps: int = 0
    bags: dict[str, nn.EmbeddingBag] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    touched: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in self.tables:
            bag = nn.EmbeddingBag(table.num_embeddings, table.embedding_dim, mode="sum",
                                  include_last_offset=True, dtype=self.dtype)
            with torch.no_grad():
                bag.weight.copy_(self.weights[table.name])
            self.bags[table.name] = bag
            self.state[table.name] = empty_state(self.optimizer.kind, bag.weight)

    def rows(self, table: str) -> Tensor:
        """The table's current rows, [num_embeddings, embedding_dim]."""
        return self.bags[table].weight.detach()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Pooled vectors of every feature, [B, embedding_dim]; the next `step` steps its rows."""
        out = {}
        for table in self.tables:
            for feature in table.feature_names:
                ids, offsets, scale = _flatten(batch[feature], table, self.dtype)
                out[feature] = self.bags[table.name](ids, offsets, per_sample_weights=scale)
                before = self.touched.get(table.name, ids[:0])
                self.touched[table.name] = torch.unique(torch.cat([before, ids]))
        return out

    def step(self) -> None:
        """Clips the summed gradients, steps every touched row once, and clears the gradients."""
        self.steps += 1
        grads = {}
        for name, bag in self.bags.items():
            dense = bag.weight.grad
            dense = torch.zeros_like(bag.weight) if dense is None else dense
            grads[name] = dense[self.touched[name]]
            bag.weight.grad = None
        for name, grad in _clipped(grads, self.optimizer).items():
            self._update(name, self.touched[name], grad)
        self.touched = {}

    @torch.no_grad()
    def _update(self, name: str, rows: Tensor, grad: Tensor) -> None:
        weight, state = self.bags[name].weight, self.state[name]
        opt = self.optimizer
        if opt.kind == "sgd":
            weight[rows] -= opt.lr * (grad + opt.weight_decay * weight[rows])
        elif opt.kind == "adagrad":
            state["sum"][rows] += grad.square()
            weight[rows] -= opt.lr * grad / (state["sum"][rows].sqrt() + opt.eps)
        elif opt.kind == "row_wise_adagrad":
            state["sum"][rows] += grad.square().mean(dim=1)
            weight[rows] -= opt.lr * grad / (state["sum"][rows].sqrt() + opt.eps)[:, None]
        else:
            row_wise = opt.kind == "row_wise_adam"
            square = grad.square().mean(dim=1) if row_wise else grad.square()
            (beta1, beta2), m, v = opt.betas, state["exp_avg"], state["exp_avg_sq"]
            m[rows] = beta1 * m[rows] + (1 - beta1) * grad
            v[rows] = beta2 * v[rows] + (1 - beta2) * square
            m_hat = m[rows] / (1 - beta1 ** self.steps)
            root = (v[rows] / (1 - beta2 ** self.steps)).sqrt() + opt.eps
            weight[rows] -= opt.lr * m_hat / (root[:, None] if row_wise else root)


def empty_state(kind: str, weight: Tensor) -> dict[str, Tensor]:
    """State of an optimiser kind before the first step, for rows [n, D]."""
    whole, per_row = torch.zeros_like(weight).detach(), torch.zeros_like(weight[:, 0]).detach()
    return {
        "sgd": {},
        "adagrad": {"sum": whole},
        "row_wise_adagrad": {"sum": per_row},
        "adam": {"exp_avg": whole, "exp_avg_sq": whole.clone()},
        "row_wise_adam": {"exp_avg": whole, "exp_avg_sq": per_row},
    }[kind]


def _flatten(bags: Bags, table: EmbeddingBagConfig,
             dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, offsets and the factor of every id, after the table's bounds mode.

    A mean divides by the number of ids the bag came with, dropped ones included; weights of a
    mean are not normalised: sum of w * row over that number.
    """
    ids, scale, offsets = [], [], [0]
    for sample, bag in enumerate(bags.ids):
        weights = [1.0] * len(bag) if bags.weights is None else bags.weights[sample]
        divisor = len(bag) if table.pooling is PoolingType.MEAN else 1
        for row, weight in zip(bag, weights, strict=True):
            inside = 0 <= row < table.num_embeddings
            if not inside and table.bounds is BoundsMode.ERROR:
                raise IndexError(f"{table.name}: {row}")
            if inside or table.bounds is BoundsMode.CLAMP_TO_ZERO:
                ids.append(row if inside else 0)
                scale.append(weight / divisor)
        offsets.append(len(ids))
    return (torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets),
            torch.tensor(scale, dtype=torch.float64).to(dtype))


def _clipped(grads: dict[str, Tensor], opt: PlainOptimizer) -> dict[str, Tensor]:
    if opt.clip_norm is not None:
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        factor = min(1.0, opt.clip_norm / (norm.item() + 1e-6))  # as torch's clip_grad_norm_
        grads = {name: grad * factor for name, grad in grads.items()}
    if opt.clip_value is not None:
        limit = opt.clip_value
        grads = {name: grad.clamp(-limit, limit) for name, grad in grads.items()}
    return grads


def join(parts: Sequence[Batch]) -> dict[str, Bags]:
    """The global batch of the ranks' batches, in rank order."""
    joined = {}
    for feature in parts[0]:
        pieces = [part[feature] for part in parts]
        weighted = pieces[0].weights is not None
        joined[feature] = Bags(
            [bag for piece in pieces for bag in piece.ids],
            [bag for piece in pieces for bag in piece.weights or []] if weighted else None)
    return joined


def split(batch: Batch, sizes: Sequence[int]) -> list[dict[str, Bags]]:
    """Cuts a global batch into ranks' batches of ``sizes`` samples; the inverse of `join`."""
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    return [{feature: bags.part(start, start + size) for feature, bags in batch.items()}
            for start, size in zip(starts, sizes, strict=True)]


def flat(batch: Batch, keys: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values [N], lengths [F * B] and weights [N] of ``keys``, feature-major like a KJT.

    Unweighted features of a batch in which others are weighted count 1.0.
    """
    bags = [bag for key in keys for bag in batch[key].ids]
    values = torch.tensor([row for bag in bags for row in bag], dtype=torch.int64)
    lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int64)
    if all(batch[key].weights is None for key in keys):
        return values, lengths, None
    weights = [w for key in keys for w in _weights_of(batch[key])]
    return values, lengths, torch.tensor(weights, dtype=torch.float32)


def _weights_of(bags: Bags) -> list[float]:
    if bags.weights is None:
        return [1.0] * sum(bags.lengths)
    return [weight for bag in bags.weights for weight in bag]
