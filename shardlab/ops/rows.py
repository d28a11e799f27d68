"""Gather, pool, sum and update of row records. Sources: own; exact fused optimisers as in
arXiv 2104.05158 (a row's gradients are summed in a fixed order, then one optimiser step).

An arena is one uint8 tensor with the blocks of all shards of a rank; `Blocks` says where each lies.
A block keeps its rows' payloads together and their optimiser states together behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.ops.registry import address, check_tensor, face_of, native
from shardlab.ops.unique import Uniques

_FP32_BYTES = 4

#: Kinds whose state is the mean over a row's columns.
#: optimiser kind -> number of its rule in the kernels.
ROW_WISE = ("row_wise_adagrad", "row_wise_adam")
RULES = {"sgd": 0, "adagrad": 1, "row_wise_adagrad": 2, "adam": 3, "row_wise_adam": 4}


@dataclass(frozen=True)
class Blocks:
    """Where the shards of an arena lie.

    Attributes:
        table: int64 [S, 6] on CPU: (row offset, row bytes, state offset, state bytes, columns,
            rows), offsets in bytes.
    """

    table: Tensor

    def rows(self, arena: Tensor, block: int) -> Tensor:
        """The payloads of one block as an fp32 view [rows, columns]."""
        offset, row_bytes, _, _, _, rows = self.table[block].tolist()
        return _matrix(arena, offset, rows, row_bytes)

    def state(self, arena: Tensor, block: int) -> Tensor:
        """The optimiser states of one block as an fp32 view [rows, state_bytes / 4]."""
        _, _, offset, state_bytes, _, rows = self.table[block].tolist()
        return _matrix(arena, offset, rows, state_bytes)


def _matrix(arena: Tensor, offset: int, rows: int, row_bytes: int) -> Tensor:
    span = arena[offset:offset + rows * row_bytes]
    return span.view(torch.float32).view(rows, row_bytes // _FP32_BYTES)


@dataclass(frozen=True)
class StepParameters:
    """Hyper-parameters of one optimiser step, as the kernels take them.

    Attributes:
        kind: a key of `RULES`.
        scale: multiplies every summed gradient first.
        clip_value: bounds every element of the scaled gradient; 0 for none.
        bias1, bias2: Adam's 1 - beta^t.
    """

    kind: str
    lr: float
    eps: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    weight_decay: float = 0.0
    scale: float = 1.0
    clip_value: float = 0.0
    bias1: float = 1.0
    bias2: float = 1.0

    def numbers(self) -> list[float]:
        """The kernels' numbers, in their order; 1 - beta is taken here, where it is exact."""
        return [self.lr, self.eps, self.beta1, self.beta2, 1.0 - self.beta1, 1.0 - self.beta2,
                self.weight_decay, self.scale, self.clip_value, self.bias1, self.bias2]


# ---------------------------------------------------------------- gather
def gather_rows(arena: Tensor, blocks: Blocks, segments: Tensor, ids: Tensor, out: Tensor) -> None:
    """Copies rows of blocks densely into ``out``.

    Args:
        arena: uint8.
        blocks: where the shards lie.
        segments: int64 [K, 4] on CPU: (block, start, count, out start): rows ids[start:start+count]
            of the block go to out[out start:], row by row.
        ids: int64.
        out: fp32, flat.
    """
    face = face_of("gather_rows", out.device.type)
    if face == "native":
        check_tensor("ids", ids, torch.int64)
        native().gather(address(arena), address(blocks.table),  # type: ignore[union-attr]
                        address(segments), segments.shape[0], address(ids), address(out),
                        torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import rows as kernels

        kernels.gather_rows(arena, blocks, segments, ids, out)
    else:
        gather_rows_reference(arena, blocks, segments, ids, out)


def gather_rows_reference(arena: Tensor, blocks: Blocks, segments: Tensor, ids: Tensor,
                          out: Tensor) -> None:
    """Plain-torch face of `gather_rows`."""
    for block, start, count, out_start in segments.tolist():
        rows = blocks.rows(arena, block)[ids[start:start + count]]
        out[out_start:out_start + rows.numel()] = rows.reshape(-1)


# ---------------------------------------------------------------- pool
def pool_rows(source: Tensor, jobs: Tensor, index: Tensor, offsets: Tensor | None,
              weights: Tensor | None, out: Tensor) -> None:
    """Pools bags of rows.

    Args:
        source: fp32, flat (an arena viewed as fp32, or received rows).
        jobs: int64 [J, 11] on CPU: (base, step, columns, bags, first, first_bag, length, mean,
            out start, out step, add). Row of position p: source[base + index[p] * step:][:columns];
            a negative index is skipped. Bag b holds the positions [first + b * length, + length),
            or with length -1 [offsets[first_bag + b], offsets[first_bag + b + 1]). ``mean`` divides
            by the bag's length; ``add`` adds to what out holds.
        index: int64 [n].
        offsets: int64, or None when every job has a length.
        weights: fp32 [n] per position, or None.
        out: fp32, flat; bag b is written to out[out start + b * out step:].
    """
    face = face_of("pool_rows", out.device.type)
    if face == "native":
        check_tensor("index", index, torch.int64)
        native().pool(address(source), address(jobs), jobs.shape[0],  # type: ignore[union-attr]
                      address(index), address(offsets), address(weights), address(out),
                      torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import rows as kernels

        kernels.pool_rows(source, jobs, index, offsets, weights, out)
    else:
        pool_rows_reference(source, jobs, index, offsets, weights, out)


def pool_rows_reference(source: Tensor, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                        weights: Tensor | None, out: Tensor) -> None:
    """Plain-torch face of `pool_rows`."""
    for (base, step, columns, bags, first, first_bag, length, mean, out_start, out_step,
         add) in jobs.tolist():
        if length >= 0:
            edges = first + length * torch.arange(bags + 1, device=index.device)
        else:
            assert offsets is not None
            edges = offsets[first_bag:first_bag + bags + 1]
        begin, end = int(edges[0]), int(edges[-1])
        lengths = edges[1:] - edges[:-1]
        bag = torch.repeat_interleave(torch.arange(bags, device=index.device), lengths)
        where = index[begin:end]
        keep = where >= 0
        columns_at = torch.arange(columns, device=index.device)
        rows = source[(base + where[keep] * step)[:, None] + columns_at]
        if weights is not None:
            rows = rows * weights[begin:end][keep][:, None]
        pooled = torch.zeros(bags, columns, device=out.device).index_add_(0, bag[keep], rows)
        if mean:
            pooled = pooled / lengths.clamp(min=1)[:, None]
        if bags == 0:
            continue
        target = out.as_strided((bags, columns), (out_step, 1), out_start)
        target.copy_(target + pooled if add else pooled)


# ---------------------------------------------------------------- sums per unique id
def sum_rows(source: Tensor, uniques: Uniques, weights: Tensor | None, pieces: Tensor,
             scale: float, out: Tensor) -> None:
    """Sums the gradients of every unique id, in entry order.

    Args:
        source: fp32, flat: the gradient that ``uniques.sources`` points into.
        uniques: entries of every unique id.
        weights: fp32 [k] per entry, or None.
        pieces: int64 [K, 6] on CPU: (start, count, columns, shift, out start, out step): unique
            start + i goes to out[out start + i * out step:][:columns]; ``shift`` is added to every
            source offset.
        scale: multiplies every sum.
        out: fp32, flat.
    """
    face = face_of("sum_rows", out.device.type)
    if face == "native":
        native().sum(address(source), address(uniques.starts),  # type: ignore[union-attr]
                     address(uniques.sources), address(weights), address(pieces), pieces.shape[0],
                     scale, address(out), torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import rows as kernels

        kernels.sum_rows(source, uniques, weights, pieces, scale, out)
    else:
        sum_rows_reference(source, uniques, weights, pieces, scale, out)


def sum_rows_reference(source: Tensor, uniques: Uniques, weights: Tensor | None, pieces: Tensor,
                       scale: float, out: Tensor) -> None:
    """Plain-torch face of `sum_rows`."""
    for start, count, columns, shift, out_start, out_step in pieces.tolist():
        if count == 0:
            continue
        total = _summed(source, uniques, weights, (start, count, columns, shift))
        out.as_strided((count, columns), (out_step, 1), out_start).copy_(total * scale)


def _summed(source: Tensor, uniques: Uniques, weights: Tensor | None,
            span: tuple[int, int, int, int]) -> Tensor:
    """Sums of ``count`` uniques from ``start`` on, [count, columns]."""
    start, count, columns, shift = span
    edges = uniques.starts[start:start + count + 1]
    begin, end = int(edges[0]), int(edges[-1])
    columns_at = torch.arange(columns, device=source.device)
    rows = source[(uniques.sources[begin:end] + shift)[:, None] + columns_at]
    if weights is not None:
        rows = rows * weights[begin:end][:, None]
    owner = torch.repeat_interleave(torch.arange(count, device=source.device),
                                    edges[1:] - edges[:-1])
    return torch.zeros(count, columns, device=source.device).index_add_(0, owner, rows)


# ---------------------------------------------------------------- update
def update_rows(arena: Tensor, blocks: Blocks, uniques: Uniques, weights: Tensor | None,
                grads: Tensor, step: StepParameters, row_squares: Tensor | None = None) -> None:
    """One exact optimiser step on every unique row: sum, scale, clip, step, write.

    Args:
        arena: uint8; stepped in place.
        blocks: where the shards lie; segment s of ``uniques`` are rows of block s.
        uniques: rows to step, and the entries of each.
        weights: fp32 [k] per entry, or None.
        grads: fp32, flat: what ``uniques.sources`` points into.
        step: hyper-parameters.
        row_squares: fp32 [m]: mean square of every row's gradient for row-wise rules whose blocks
            hold only some of its columns, -1 where the block's own mean is right; or None.
    """
    face = face_of("update_rows", grads.device.type)
    if face == "native":
        native().update(address(arena), address(blocks.table),  # type: ignore[union-attr]
                        blocks.table.shape[0], address(uniques.ids), address(uniques.splits),
                        address(uniques.starts), address(uniques.sources), address(weights),
                        address(grads), address(row_squares), RULES[step.kind],
                        step.numbers(), torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import rows as kernels

        kernels.update_rows(arena, blocks, uniques, weights, grads, step, row_squares)
    else:
        update_rows_reference(arena, blocks, uniques, weights, grads, step, row_squares)


def update_rows_reference(arena: Tensor, blocks: Blocks, uniques: Uniques,
                          weights: Tensor | None, grads: Tensor, step: StepParameters,
                          row_squares: Tensor | None = None) -> None:
    """Plain-torch face of `update_rows`."""
    splits = uniques.splits.tolist()
    for block in range(blocks.table.shape[0]):
        start, count = splits[block], splits[block + 1] - splits[block]
        if count == 0:
            continue
        rows, state = blocks.rows(arena, block), blocks.state(arena, block)
        grad = _summed(grads, uniques, weights, (start, count, rows.shape[1], 0)) * step.scale
        if step.clip_value > 0:
            grad = grad.clamp(-step.clip_value, step.clip_value)
        ids = uniques.ids[start:start + count]
        row, row_state = rows[ids], state[ids]
        square = (grad * grad).mean(1, keepdim=True)
        if row_squares is not None:
            given = row_squares[start:start + count, None]
            square = torch.where(given < 0, square, given)
        _step_rows(row, row_state, grad, square, step)
        rows[ids], state[ids] = row, row_state


def _step_rows(row: Tensor, state: Tensor, grad: Tensor, row_square: Tensor,
               step: StepParameters) -> None:
    """Steps rows [n, D] and their state [n, S] in place; row_square [n, 1] is mean(grad^2)."""
    columns = row.shape[1]
    if step.kind == "sgd":
        row -= step.lr * (grad + step.weight_decay * row)
    elif step.kind == "adagrad":
        state += grad * grad
        row -= step.lr * grad / (state.sqrt() + step.eps)
    elif step.kind == "row_wise_adagrad":
        state += row_square
        row -= step.lr / (state.sqrt() + step.eps) * grad
    else:
        first, second = state[:, :columns], state[:, columns:]
        square = row_square if step.kind == "row_wise_adam" else grad * grad
        first.mul_(step.beta1).add_(grad * (1 - step.beta1))
        second.mul_(step.beta2).add_(square * (1 - step.beta2))
        row -= step.lr * (first / step.bias1) / ((second / step.bias2).sqrt() + step.eps)
