"""One optimiser for tables and dense layers, usable with torch.optim.lr_scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from shardlab.comm import Groups
from shardlab.errors import CheckpointError
from shardlab.optim.rules import RowOptimizer, step_parameters
from shardlab.sharded.collection import ShardedEmbeddingBagCollection
from shardlab.sharded.dense import DenseReducer

#: Keeps a zero norm from dividing; torch.nn.utils.clip_grad_norm_ uses the same.
_NORM_EPS = 1e-6


class ShardedOptimizer(torch.optim.Optimizer):
    """Steps table rows with fused kernels and the dense parameters with a torch optimiser.

    The gradient of a table row is the mean over ranks of what their local losses give, as for
    dense parameters; over the ranks of a replica group where rows are averaged now and then.
    ``param_groups[0]`` holds the tables' hyper-parameters, the dense optimiser's groups follow; a
    scheduler moves them all.

    Args:
        collections: the sharded tables, at least one collection.
        rows: optimiser of the rows.
        dense: optimiser of the other parameters, or None when there are none.
        groups: the ranks.
        reducer: averages the dense gradients over ranks; None: there is nothing to average.
    """

    def __init__(self, collections: Sequence[ShardedEmbeddingBagCollection], rows: RowOptimizer,
                 dense: torch.optim.Optimizer | None, groups: Groups,
                 reducer: DenseReducer | None = None) -> None:
        self._collections, self.dense, self._groups = list(collections), dense, groups
        self._clock = self._collections[0].clock
        self._reducer = reducer
        self.steps_taken = 0
        placeholder = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        super().__init__([{"params": [placeholder], **rows.group()}], {})
        self._link_dense_groups()

    def _link_dense_groups(self) -> None:
        """The dense groups here are the dense optimiser's own dicts, so that a schedule acts."""
        dense = [] if self.dense is None else self.dense.param_groups
        self.param_groups = [self.param_groups[0], *dense]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients, of rows and of dense parameters."""
        for collection in self._collections:
            collection.forget_gradients()
        if self.dense is not None:
            self.dense.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step on every row that got a gradient, and on the dense parameters."""
        return self._watched_step(closure) if self._is_watched() else self._step(closure)

    # torch would wrap `step` in hooks and a record for its profiler, which in a cold cache costs
    # 0.1 ms a step also where nobody listens.
    step.hooked = True  # type: ignore[attr-defined]

    def _is_watched(self) -> bool:
        return bool(self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
                    or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
                    or torch.autograd._profiler_enabled())

    @torch.no_grad()
    def _step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._reducer is not None:
            self._reducer.settle()
        self.steps_taken += 1
        self._begin_dense_step()
        group, scale = self.param_groups[0], 1.0 / self._collections[0].summed_ranks
        step = step_parameters(group, self.steps_taken, scale)
        # A norm needs all gradients, on the thread that also reduces the dense ones.
        behind = group["clip_norm"] is None and all(c.updates_behind for c in self._collections)
        for collection in self._collections:
            collection.set_apart(allowed=group["clip_norm"] is None and not behind)
            collection.announcements.before_update()
        if behind:
            self._clock.lap("dense")
            for collection in self._collections:
                collection.update_behind(self.steps_taken, step)
                collection.sync_replicas(self.steps_taken)
            self._clock.lap("update")
            self._step_dense()
            return loss
        self._wait_for_gradients()
        merged = [(c, c.updater.merge_rows(c.pending)) for c in self._collections if c.pending]
        if group["clip_norm"] is not None and merged:
            squares = [c.updater.squared_norm(rows, scale) for c, rows in merged]
            norm = float(torch.stack(squares).sum().sqrt())
            step = replace(step, scale=scale * min(1.0, group["clip_norm"] / (norm + _NORM_EPS)))
        for collection in self._collections:
            collection.begin_step(self.steps_taken)
        for collection, rows in merged:
            collection.update(rows, step)
            collection.pending.clear()
        for collection in self._collections:
            collection.after_step(self.steps_taken)
            collection.sync_replicas(self.steps_taken)
            collection.send_late_rows()
            collection.update_rest(self.steps_taken, step)
        self._clock.lap("update")
        self._step_dense()
        return loss

    _watched_step = torch.optim.Optimizer.profile_hook_step(_step)

    def skip_step(self) -> None:
        """In the place of `step`, on every rank: forgets the gradients of a batch."""
        if self._reducer is not None:
            self._reducer.settle()
        self.zero_grad()

    def _step_dense(self) -> None:
        """Last: rows that the next batch waits for travel behind it."""
        if self.dense is not None:
            self.dense.step()
            self._clock.lap("dense")

    def _begin_dense_step(self) -> None:
        if self._reducer is not None:
            self._reducer.begin_step(self.steps_taken)

    def _wait_for_gradients(self) -> None:
        self._clock.lap("dense")
        for collection in self._collections:
            for pending in collection.pending:
                pending.work.wait()
        self._clock.lap("grads")

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Hyper-parameters, step count and dense state; rows' state is in the tables' chunks."""
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        return {"rows": group, "steps_taken": self.steps_taken,
                "dense": None if self.dense is None else self.dense.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Takes over what `state_dict` gave.

        Raises:
            CheckpointError: it was saved by another kind of row optimiser.
        """
        saved, mine = state_dict["rows"]["kind"], self.param_groups[0]["kind"]
        if saved != mine:
            raise CheckpointError(f"the checkpoint's rows were trained by {saved}, this job uses "
                                  f"{mine}; use the same optimiser, or start anew")
        self.param_groups[0].update(state_dict["rows"])
        self.steps_taken = state_dict["steps_taken"]
        self._begin_dense_step()
        for collection in self._collections:
            collection.begin_step(self.steps_taken)
        if self.dense is not None:
            self.dense.load_state_dict(state_dict["dense"])
        self._link_dense_groups()
