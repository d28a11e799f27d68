"""Where an op's faces are tested, and the row problems that all of them must agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.registry import has_triton, native
from shardlab.ops.rows import gather_rows, pool_rows, sum_rows, update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import BOUNDS_CODE, Segments, Uniques, unique_segments_reference
from shardlab.specs import BoundsMode
from shardlab.storage_bytes import OPTIMIZER_STATE

DIMS = (1, 4, 16, 17, 24, 64, 100, 130)
KINDS = tuple(OPTIMIZER_STATE)


@dataclass(frozen=True)
class Place:
    """A face of the ops, and where its tensors lie."""

    face: str
    device: str


_NATIVE = pytest.mark.skipif(native() is None, reason="the native library is not built")
_INTERPRETED = pytest.mark.skipif(
    not has_triton() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="triton is not installed, or runs on the CUDA device here")
_GPU_TRITON = (pytest.mark.gpu, pytest.mark.skipif(not has_triton(), reason="no triton"))

#: Faces of index arithmetic, all judged by an independent model.
INDEX_PLACES = [
    pytest.param(Place("reference", "cpu"), id="reference"),
    pytest.param(Place("native", "cpu"), id="native", marks=_NATIVE),
    pytest.param(Place("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
]
#: Faces of row arithmetic, all judged by the reference on the CPU.
ROW_PLACES = [
    pytest.param(Place("native", "cpu"), id="native", marks=_NATIVE),
    pytest.param(Place("triton", "cpu"), id="triton-interpreted", marks=_INTERPRETED),
    pytest.param(Place("triton", "cuda"), id="triton-cuda", marks=_GPU_TRITON),
    pytest.param(Place("reference", "cuda"), id="reference-cuda", marks=pytest.mark.gpu),
]
REFERENCE = Place("reference", "cpu")


@contextmanager
def face(name: str) -> Iterator[None]:
    """Forces a face of every op."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDLAB_FACE", name)
        yield


# ---------------------------------------------------------------- problems
@dataclass(frozen=True)
class Problem:
    """Tables of several widths in one arena, a batch of ids, and a gradient for them.

    Attributes:
        dims: columns of every table.
        arena, blocks: rows and their optimiser states.
        ids: int64 [tables * entries].
        entries: ids of every table.
        uniques: of the ids, one segment a table; sources point into ``grads``.
        grads: fp32 [entries * sum(dims)], flat: row i has the gradients of entry i of all tables.
        entry_weights: fp32 per entry of ``uniques``, or None.
    """

    dims: tuple[int, ...]
    arena: Tensor
    blocks: Blocks
    ids: Tensor
    entries: int
    uniques: Uniques
    grads: Tensor
    entry_weights: Tensor | None

    def to(self, device: str) -> Problem:
        """A copy on another device; what lies on the CPU by contract stays there."""
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, copy=True)

        uniques = replace(self.uniques, ids=move(self.uniques.ids),
                          starts=move(self.uniques.starts), sources=move(self.uniques.sources))
        return replace(self, arena=move(self.arena), ids=move(self.ids), uniques=uniques,
                       grads=move(self.grads), entry_weights=move(self.entry_weights))


def draw_ids(rows: int, count: int, skew: str, generator: torch.Generator) -> Tensor:
    """int64 [count] in [0, rows), with the last row among them where there is room."""
    unit = torch.rand(count, generator=generator)
    if skew == "zipf":
        ids = (torch.tensor(float(rows)) ** unit - 1).long()
    elif skew == "one":
        ids = torch.zeros(count, dtype=torch.int64)
    else:
        ids = (unit * rows).long()
    if count > 1 and skew != "one":
        ids[count // 2] = rows - 1
    return ids.clamp_(0, rows - 1)


def build_blocks(dims: tuple[int, ...], rows: tuple[int, ...], kind: str,
                 generator: torch.Generator) -> tuple[Tensor, Blocks]:
    """Random rows and positive states; between them, and between blocks, bytes of 0xff."""
    per_column, per_row = OPTIMIZER_STATE[kind]
    table, parts, offset = [], [], 0
    for dim, count in zip(dims, rows, strict=True):
        state = per_column * dim + per_row
        starts = []
        for part in (torch.randn(count, dim, generator=generator),
                     torch.rand(count, state, generator=generator) + 0.5):
            parts += [torch.full((16,), 255, dtype=torch.uint8), part.view(-1).view(torch.uint8)]
            starts.append(offset + 16)
            offset += 16 + 4 * part.numel()
        table.append((starts[0], 4 * dim, starts[1], 4 * state, dim, count))
    return torch.cat(parts), Blocks(torch.tensor(table).view(-1, 6))


def make_problem(dims: tuple[int, ...], *, kind: str = "sgd", rows: int = 40, entries: int = 50,
                 skew: str = "uniform", weighted: bool = False) -> Problem:
    """Every second table has three rows only; the same arguments give the same problem."""
    generator = torch.Generator().manual_seed(sum(dims) + rows + entries)
    sizes = tuple(min(rows, 3) if t % 2 else rows for t in range(len(dims)))
    arena, blocks = build_blocks(dims, sizes, kind, generator)
    width, columns = sum(dims), torch.tensor([0, *dims]).cumsum(0).tolist()
    ids = torch.cat([draw_ids(n, entries, skew, generator) for n in sizes])
    chunks = torch.tensor([(t, t * entries, entries, columns[t], width) for t in range(len(dims))])
    uniques = unique_segments_reference(
        ids, chunks, segments(list(sizes), [BoundsMode.ERROR] * len(dims)))
    weights = torch.rand(ids.numel(), generator=generator) + 0.5 if weighted else None
    return Problem(dims, arena, blocks, ids, entries, uniques,
                   torch.randn(entries * width, generator=generator), weights)


def segments(limits: list[int], bounds: list[BoundsMode]) -> Segments:
    return Segments(torch.tensor(limits, dtype=torch.int64),
                    torch.tensor([BOUNDS_CODE[mode] for mode in bounds], dtype=torch.int64))


# ---------------------------------------------------------------- runs; each returns CPU tensors
def run_gather(problem: Problem, place: Place) -> Tensor:
    """Rows of every table in reverse order of the tables, then two rows of the first again."""
    problem = problem.to(place.device)
    n, starts, at = problem.entries, [], 0
    for t in reversed(range(len(problem.dims))):
        starts.append((t, t * n, n, at))
        at += n * problem.dims[t]
    starts.append((0, 0, min(n, 2), at + 3))
    out = torch.full((at + 3 + 2 * problem.dims[0],), -7.0, device=place.device)
    with face(place.face):
        gather_rows(problem.arena, problem.blocks, torch.tensor(starts), problem.ids, out)
    return out.cpu()


@dataclass(frozen=True)
class PoolOptions:
    """What `run_pool` varies."""

    ragged: bool = True
    weighted: bool = False
    mean: bool = False
    add: bool = False
    dropped: bool = False


def run_pool(problem: Problem, options: PoolOptions, place: Place) -> Tensor:
    """Pools every table's ids into its columns of a [bags, 1 + sum(dims)] output."""
    generator = torch.Generator().manual_seed(problem.entries)
    n, bags = problem.entries, max(1, problem.entries // 5)
    index = problem.ids.clone()
    if options.dropped:
        index[torch.rand(index.shape, generator=generator) < 0.3] = -1
    # Bags end where they may: the first and the last of a table can be empty, others twice as long.
    cuts = torch.randint(0, n + 1, (len(problem.dims), bags - 1), generator=generator)
    ends = torch.cat([cuts.sort(1).values, torch.full((len(cuts), 1), n)], 1)
    ends += n * torch.arange(len(cuts))[:, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends.view(-1)])
    jobs, width, column = [], 1 + sum(problem.dims), 1
    for t, (offset, row_bytes, _, _, dim, _) in enumerate(problem.blocks.table.tolist()):
        length = -1 if options.ragged else n // bags
        jobs.append((offset // 4, row_bytes // 4, dim, bags, t * n, t * bags, length,
                     int(options.mean), column, width, int(options.add)))
        column += dim
    weights = torch.rand(index.numel(), generator=generator) if options.weighted else None
    moved = [None if x is None else x.to(place.device) for x in
             (problem.arena, index, offsets if options.ragged else None, weights)]
    out = torch.full((bags * width,), 2.0, device=place.device)
    with face(place.face):
        pool_rows(moved[0].view(torch.float32), torch.tensor(jobs), *moved[1:], out)
    return out.cpu()


def run_sum(problem: Problem, scale: float, place: Place, *, halves: bool = False) -> Tensor:
    """Sums of every unique id's entries; by ``halves`` each table's columns come in two pieces."""
    problem = problem.to(place.device)
    pieces, at, splits = [], 5, problem.uniques.splits.tolist()
    for t, dim in enumerate(problem.dims):
        parts = [(0, dim)] if not halves or dim < 2 else [(0, dim // 2), (dim // 2, dim)]
        for first, last in parts:
            count, columns = splits[t + 1] - splits[t], last - first
            pieces.append((splits[t], count, columns, first, at, columns + 3))
            at += count * (columns + 3)
    out = torch.full((at,), -7.0, device=place.device)
    with face(place.face):
        sum_rows(problem.grads, problem.uniques, problem.entry_weights, torch.tensor(pieces), scale,
                 out)
    return out.cpu()


def run_update(problem: Problem, step: StepParameters, place: Place) -> Tensor:
    """The arena after one step, as fp32; what lies between the blocks reads as NaN."""
    problem = problem.to(place.device)
    with face(place.face):
        update_rows(problem.arena, problem.blocks, problem.uniques, problem.entry_weights,
                    problem.grads, step)
    return problem.arena.cpu().view(torch.float32)


def step_of(kind: str, **changes: float) -> StepParameters:
    """A step of this rule, as Adam takes its third."""
    adam = {"beta1": 0.9, "beta2": 0.999, "bias1": 1 - 0.9**3, "bias2": 1 - 0.999**3}
    return replace(StepParameters(kind, lr=0.1, eps=1e-3, **adam), **changes)


#: Largest relative and absolute difference from the reference. A sum of up to 50 entries or a step
#: rounds each of its terms once more or less where a face contracts products into fused
#: multiply-adds or adds in chunks: some units of 2^-24 of the largest term, which is about 4.
TOLERANCE = {"rtol": 2e-6, "atol": 4e-6}


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE, equal_nan=True)
