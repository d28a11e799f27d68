"""Gather, pool, sum and update of row records. Sources: own; exact fused optimisers as in
arXiv 2104.05158 (a row's gradients are summed in a fixed order, then one optimiser step).

An arena is one uint8 tensor with the blocks of all shards of a rank; `Blocks` says where each lies
and in what precision. Rows narrower than fp32 are decoded, stepped in fp32 and encoded in one pass;
no fp32 copy of them exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shardlab.codecs import decode
from shardlab.ops.blocks import NAMES, Blocks
from shardlab.ops.records import Records
from shardlab.ops.registry import address, check_tensor, face_of, native
from shardlab.ops.step_parameters import RULES, StepParameters
from shardlab.ops.unique import Uniques
from shardlab.storage_bytes import payload_bytes


# ---------------------------------------------------------------- gather
def gather_rows(arena: Tensor, blocks: Blocks, segments: Tensor, ids: Tensor, out: Tensor) -> None:
    """Copies rows of blocks densely into ``out``, as fp32.

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
        rest = (address(segments), segments.shape[0], address(ids), address(out),
                torch.get_num_threads())
        if blocks.encodings is None:
            native().gather(address(arena), address(blocks.table),  # type: ignore[union-attr]
                            *rest)
        else:
            native().gather_encoded(address(arena),  # type: ignore[union-attr]
                                    address(blocks.table), address(blocks.encodings), *rest)
    elif face == "triton":
        if blocks.encodings is None:
            from shardlab.ops.triton import rows as kernels

            kernels.gather_rows(arena, blocks, segments, ids, out)
        else:
            from shardlab.ops.triton import encoded

            encoded.gather_rows(arena, blocks, segments, ids, out)
    else:
        gather_rows_reference(arena, blocks, segments, ids, out)


def gather_rows_reference(arena: Tensor, blocks: Blocks, segments: Tensor, ids: Tensor,
                          out: Tensor) -> None:
    """Plain-torch face of `gather_rows`."""
    for block, start, count, out_start in segments.tolist():
        rows = Records(arena, blocks, block, ids[start:start + count]).read_rows()
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


def job_spans(jobs: Tensor, offsets: Tensor | None) -> list[tuple[int, int, int]]:
    """(block, start, count) of the index positions of pooling jobs.

    Args:
        jobs: int64 [J, 11] as `pool_rows` takes them, with a block's number in the first column.
        offsets: as in `pool_rows`.
    """
    spans = []
    for block, _, _, bags, first, first_bag, length, *_ in jobs.tolist():
        if length >= 0:
            spans.append((block, first, bags * length))
        else:
            assert offsets is not None
            start, end = int(offsets[first_bag]), int(offsets[first_bag + bags])
            spans.append((block, start, end - start))
    return spans


def pool_rows_reference(source: Tensor, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                        weights: Tensor | None, out: Tensor) -> None:
    """Plain-torch face of `pool_rows`."""
    for job in jobs.tolist():
        columns_at = torch.arange(job[2], device=index.device)
        _pool_bags(job, lambda at, columns_at=columns_at: source[at[:, None] + columns_at], index,
                   offsets, weights, out)


def pool_blocks(arena: Tensor, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                weights: Tensor | None, out: Tensor) -> None:
    """Pools bags of rows of any codec.

    Args:
        arena: uint8.
        jobs: int64 [J, 12] on CPU: the numbers of a job of `pool_rows` with base and step in bytes,
            then the codec's number.
        index, offsets, weights, out: as in `pool_rows`.
    """
    face = face_of("pool_blocks", out.device.type)
    if face == "native":
        check_tensor("index", index, torch.int64)
        native().pool_encoded(address(arena), address(jobs),  # type: ignore[union-attr]
                              jobs.shape[0], address(index), address(offsets), address(weights),
                              address(out), torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import encoded as kernels

        kernels.pool_blocks(arena, jobs, index, offsets, weights, out)
    else:
        pool_blocks_reference(arena, jobs, index, offsets, weights, out)


def pool_blocks_reference(arena: Tensor, jobs: Tensor, index: Tensor, offsets: Tensor | None,
                          weights: Tensor | None, out: Tensor) -> None:
    """Plain-torch face of `pool_blocks`."""
    for *job, number in jobs.tolist():
        codec, columns = NAMES[number], job[2]
        bytes_at = torch.arange(payload_bytes(codec, columns), device=index.device)

        def read(at: Tensor, codec: str = codec, columns: int = columns,
                 bytes_at: Tensor = bytes_at) -> Tensor:
            return decode(arena[at[:, None] + bytes_at], codec, columns)

        _pool_bags(job, read, index, offsets, weights, out)


def _pool_bags(job: list[int], read: Callable[[Tensor], Tensor], index: Tensor,
               offsets: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    """One job; ``read`` gives the rows fp32 [n, columns] that begin at int64 [n]."""
    base, step, columns, bags, first, first_bag, length, mean, out_start, out_step, add = job
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
    rows = read(base + where[keep] * step)
    if weights is not None:
        rows = rows * weights[begin:end][keep][:, None]
    pooled = torch.zeros(bags, columns, device=out.device).index_add_(0, bag[keep], rows)
    if mean:
        pooled = pooled / lengths.clamp(min=1)[:, None]
    if bags == 0:
        return
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
        blocks: where the shards lie; segment s of ``uniques`` are rows of block s. Encoded rows and
            states are rounded as their block's encoding says.
        uniques: rows to step, and the entries of each.
        weights: fp32 [k] per entry, or None.
        grads: fp32, flat: what ``uniques.sources`` points into.
        step: hyper-parameters.
        row_squares: fp32 [m]: mean square of every row's gradient for row-wise rules whose blocks
            hold only some of its columns, -1 where the block's own mean is right; or None.
    """
    face = face_of("update_rows", grads.device.type)
    if face == "native" and blocks.encodings is None:
        native().update(address(arena), address(blocks.table),  # type: ignore[union-attr]
                        blocks.table.shape[0], address(uniques.ids), address(uniques.splits),
                        address(uniques.starts), address(uniques.sources), address(weights),
                        address(grads), address(row_squares), RULES[step.kind],
                        step.numbers(), torch.get_num_threads())
    elif face == "native":
        native().update_encoded(  # type: ignore[union-attr]
            [address(arena), address(blocks.table), address(blocks.encodings)],
            blocks.table.shape[0],
            [address(tensor) for tensor in (uniques.ids, uniques.splits, uniques.starts,
                                            uniques.sources, weights, grads, row_squares)],
            RULES[step.kind], step.numbers(), step.key, address(step.rows),
            torch.get_num_threads())
    elif face == "triton" and blocks.encodings is None:
        from shardlab.ops.triton import rows as kernels

        kernels.update_rows(arena, blocks, uniques, weights, grads, step, row_squares)
    elif face == "triton":
        from shardlab.ops.triton import encoded

        encoded.update_rows(arena, blocks, uniques, weights, grads, step, row_squares)
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
        records = Records(arena, blocks, block, uniques.ids[start:start + count])
        grad = _summed(grads, uniques, weights, (start, count, records.columns, 0)) * step.scale
        if step.clip_value > 0:
            grad = grad.clamp(-step.clip_value, step.clip_value)
        row, state = records.read_rows(), records.read_states()
        square = (grad * grad).mean(1, keepdim=True)
        if row_squares is not None:
            given = row_squares[start:start + count, None]
            square = torch.where(given < 0, square, given)
        _step_rows(row, state, grad, square, step)
        given_rows = None if step.rows is None else step.rows[start:start + count]
        words = records.words(step.key, given_rows)
        records.write_rows(row, words)
        records.write_states(state, words)


def _step_rows(row: Tensor, state: Tensor, grad: Tensor, row_square: Tensor,
               step: StepParameters) -> None:
    """Steps rows [n, D] and their state [n, S] in place; row_square [n, 1] is mean(grad^2)."""
    columns = row.shape[1]
    if step.kind == "sgd":
        row -= step.lr * (grad + step.weight_decay * row)
    elif step.kind == "adagrad":
        state += grad * grad
        row -= step.lr * grad / (_root(state) + step.eps)
    elif step.kind == "row_wise_adagrad":
        state += row_square
        # A number over a tensor would be its reciprocal times the number, rounded twice.
        row -= torch.full_like(state, step.lr) / (_root(state) + step.eps) * grad
    else:
        first, second = state[:, :columns], state[:, columns:]
        square = row_square if step.kind == "row_wise_adam" else grad * grad
        first.mul_(step.beta1).add_(grad * (1 - step.beta1))
        second.mul_(step.beta2).add_(square * (1 - step.beta2))
        row -= step.lr * (first / step.bias1) / (_root(second / step.bias2) + step.eps)


def _root(x: Tensor) -> Tensor:
    """Square root to the nearest fp32; torch's own on CPU is a unit off at one in five."""
    return x.double().sqrt().float()
