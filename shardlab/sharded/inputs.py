"""Batches as the exchange wants them: features by name, ids checked, errors with names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from shardlab.errors import BoundsError, InputError, nearest_name
from shardlab.jagged import KeyedJaggedTensor, as_kjt
from shardlab.ops.chunk_numbers import spread_ids
from shardlab.sharded.layout import Layout
from shardlab.specs import UNBOUNDED, PoolingType


@dataclass(frozen=True)
class Batch:
    """A batch with its features in the layout's order.

    Attributes:
        values: int64 [n], feature-major.
        offsets: int64 [features * size + 1], or None with a fixed length.
        length: ids in every bag, or -1 when offsets tell.
        weights: fp32 [n], or None.
        size: samples.
        layout: whose features these are.
    """

    values: Tensor
    offsets: Tensor | None
    length: int
    weights: Tensor | None
    size: int
    layout: Layout

    @cached_property
    def feature_starts(self) -> Tensor:
        """int64 [features + 1] on CPU: first position of every feature."""
        count = len(self.layout.features)
        if self.offsets is None:
            return torch.arange(count + 1) * (self.size * self.length)
        if self.size == 0:
            return torch.zeros(count + 1, dtype=torch.int64)
        return self.offsets[:: self.size].contiguous().cpu()

    @cached_property
    def bags(self) -> Tensor | None:
        """int64 [n]: sample of every position; None when position and sample are one."""
        if self.length == 1:
            return None
        samples = torch.arange(self.size, device=self.values.device)
        count = len(self.layout.features)
        if self.offsets is None:
            return samples.repeat_interleave(self.length).repeat(count)
        return torch.repeat_interleave(samples.repeat(count), self.offsets.diff())

    @cached_property
    def mean_divisors(self) -> list[tuple[int, int, int, Tensor | float]]:
        """(feature, first column, end column, bag lengths [size, 1]) of mean-pooled features."""
        found: list[tuple[int, int, int, Tensor | float]] = []
        if self.length == 1:
            return found
        for f, table in enumerate(self.layout.feature_table):
            config = self.layout.tables[table]
            if config.pooling is not PoolingType.MEAN:
                continue
            first = self.layout.feature_columns[f]
            divisor: Tensor | float = float(max(self.length, 1))
            if self.offsets is not None:
                edges = self.offsets[f * self.size:(f + 1) * self.size + 1]
                divisor = edges.diff().clamp(min=1).float()[:, None]
            found.append((f, first, first + config.embedding_dim, divisor))
        return found


Found = TypeVar("Found")
#: Shapes remembered; a training run has two: full batches and the last one.
_MAX_SHAPES = 16


class PerShape(Generic[Found]):
    """What follows from (size, bag length) alone: made once where all bags have one length."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], Found] = {}

    def of(self, batch: Batch, make: Callable[[Batch], Found]) -> Found:
        """For this batch; made anew where its bags differ in length.

        Args:
            batch: of any shape.
            make: finds it for a batch; what it returns is shared, and must stay as it is. Not kept:
                whoever keeps this would keep itself, and with it files that others wait for.
        """
        if batch.length < 0:
            return make(batch)
        key = (batch.size, batch.length)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= _MAX_SHAPES:  # the thread that looks ahead comes here, too
                self._found.pop(next(iter([*self._found])), None)
            found = self._found[key] = make(batch)
        return found


class InputReader:
    """Turns whatever a model passes into a `Batch`; features are matched by name every time.

    Args:
        layout: the features that must come, and their tables.
        device: where ids are needed.
        rank: of the job, for errors; None: the layout's.
    """

    def __init__(self, layout: Layout, device: torch.device, rank: int | None = None) -> None:
        self.layout, self.device = layout, device
        self._rank = layout.rank if rank is None else rank
        self._expected = list(layout.features)
        self._unbounded = [f for f, table in enumerate(layout.feature_table)
                           if layout.tables[table].num_embeddings == UNBOUNDED]
        self._orders: dict[tuple[str, ...], list[int]] = {}

    def read(self, features: Any) -> Batch:
        """Returns the batch in the layout's feature order.

        Raises:
            InputError: a feature is missing, unknown or malformed.
        """
        try:
            kjt = self._matched(features)
        except InputError as error:
            raise InputError(f"rank {self._rank}: {error}") from None
        weights = kjt.weights_or_none()
        values = kjt.values()
        if values.device != self.device:
            kjt = kjt.to(self.device)
            values, weights = kjt.values(), kjt.weights_or_none()
        length = -1 if kjt.fixed_length is None else kjt.fixed_length
        offsets = kjt.offsets().long() if length < 0 else None
        batch = Batch(values.contiguous(), offsets, length,
                      None if weights is None else weights.float().contiguous(), kjt.stride(),
                      self.layout)
        return replace(batch, values=self._hashed(batch)) if self._unbounded else batch

    def _hashed(self, batch: Batch) -> Tensor:
        """The ids with those of unbounded tables spread over their rows."""
        values, edges = batch.values.long().clone(), batch.feature_starts.tolist()
        for feature in self._unbounded:
            part = slice(edges[feature], edges[feature + 1])
            values[part] = spread_ids(values[part], UNBOUNDED)
        return values

    def _matched(self, features: Any) -> KeyedJaggedTensor:
        kjt = as_kjt(features, self._expected)
        if kjt.keys() != self._expected:
            kjt = kjt.permute(self._order_of(tuple(kjt.keys())))
        weights = kjt.weights_or_none()
        if weights is not None and weights.requires_grad:
            raise InputError("per-sample weights require a gradient, which tables do not return; "
                             "pass weights.detach()")
        return kjt

    def _order_of(self, keys: tuple[str, ...]) -> list[int]:
        order = self._orders.get(keys)
        if order is None:
            problems = [f"feature {key!r} is unknown{nearest_name(key, self._expected)}"
                        for key in keys if key not in self._expected]
            problems += [f"feature {key!r} of table {self._table_of(f)!r} is missing"
                         for f, key in enumerate(self._expected) if key not in keys]
            if problems:
                raise InputError("\n".join([*problems, f"the batch has {_few(keys)}, the tables "
                                            f"need {_few(self._expected)}"]))
            order = [keys.index(key) for key in self._expected]
            self._orders[keys] = order
        return order

    def _table_of(self, feature: int) -> str:
        return self.layout.tables[self.layout.feature_table[feature]].name

    def bounds_error(self, batch: Batch, position: int) -> BoundsError:
        """Names what is wrong with the id at a position of ``batch.values``."""
        feature = int(torch.searchsorted(batch.feature_starts, position, right=True)) - 1
        table = self.layout.tables[self.layout.feature_table[feature]]
        if batch.offsets is None:
            row = position // batch.length - feature * batch.size
        else:
            row = int(torch.searchsorted(batch.offsets, position, right=True)) - 1
            row -= feature * batch.size
        return BoundsError(
            f"feature {self.layout.features[feature]!r}, table {table.name!r}, rank "
            f"{self._rank}, row {row} of the batch: id {int(batch.values[position])} is "
            f"outside [0, {table.num_embeddings}); fix the data, raise num_embeddings, or set the "
            "table's bounds to clamp_to_zero or ignore")


def _few(names: Any) -> str:
    names = list(names)
    text = ", ".join(map(repr, names[:8]))
    return text if len(names) <= 8 else f"{text} and {len(names) - 8} more"
