"""Problems on rows of every codec that all faces must solve to the same bits.

Gradients are multiples of 1/8, so that sums come out the same in any order. As a program it writes
what the native face gives with one instruction set:

    SHARDLAB_ISA=avx2 python -m tests.shardlab.ops.encoded_cases OUTPUT_FILE avx2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shardlab.codecs import CODECS, encode, rounding_key, row_words
from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.moves import move_rows
from shardlab.ops.records import MoveEnd
from shardlab.ops.registry import native
from shardlab.ops.rounding import Rounding
from shardlab.ops.rows import gather_rows, pool_blocks, update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import unique_segments_reference
from shardlab.specs import BoundsMode
from shardlab.storage_bytes import OPTIMIZER_STATE, payload_bytes
from tests.shardlab.ops.cases import Place, draw_ids, face, segments, step_of

#: Kinds whose steps round alike in every face; others differ in the last bit before rounding.
EXACT_KINDS = ("sgd", "adagrad", "row_wise_adagrad")
GAP = 13  # bytes of 0xff between blocks, so that encoded rows are not aligned


@dataclass(frozen=True)
class EncodedProblem:
    """One table per codec, all of one width, in one arena."""

    dim: int
    arena: Tensor
    blocks: Blocks
    ids: Tensor
    entries: int
    uniques: object
    grads: Tensor

    def to(self, device: str) -> EncodedProblem:
        """A copy on another device; blocks and splits stay on the CPU."""
        moved = {name: getattr(self.uniques, name).to(device) for name in
                 ("ids", "starts", "sources")}
        return replace(self, arena=self.arena.to(device, copy=True), ids=self.ids.to(device),
                       uniques=replace(self.uniques, **moved), grads=self.grads.to(device))


def awkward_values(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """fp32 of all magnitudes: subnormals of every codec, zeros, ties, and beyond the largest."""
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.exp2(torch.randint(-40, 20, (rows, 1), generator=generator).float())
    special = [0.0, -0.0, 65504.0, 65519.9, -65520.0, 3.4e38, float("inf"), -float("inf"),
               float("nan"), 1e-45, -1e-40, 2.0**-24, 1.5 * 2.0**-25, 448.0, 464.0, -1.0009765]
    for row in range(rows // 2):
        values[row, (row // len(special)) % columns] = special[row % len(special)]
    return values


def make_encoded(dim: int, kind: str = "sgd", *, state_codec: str = "fp32", rows: int = 60,
                 entries: int = 80, stochastic: bool = True) -> EncodedProblem:
    """The same arguments give the same problem."""
    generator = torch.Generator().manual_seed(dim + rows)
    per_column, per_row = OPTIMIZER_STATE[kind]
    states = per_column * dim + per_row
    table, parts, encodings, offset = [], [], [], 0
    for number, codec in enumerate(CODECS):
        values = torch.randn(rows, dim, generator=generator) * 0.1
        state = torch.rand(rows, states, generator=generator) + 0.5
        words = row_words(number, torch.arange(rows))
        starts = []
        for records in (encode(values, codec, words), encode(state, state_codec, words)):
            gap = GAP if records.shape[1] % 4 else GAP + -(offset + GAP) % 4  # fp32 on whole words
            parts += [torch.full((gap,), 255, dtype=torch.uint8), records.reshape(-1)]
            starts.append(offset + gap)
            offset += gap + records.numel()
        table.append((starts[0], payload_bytes(codec, dim), starts[1],
                      payload_bytes(state_codec, states), dim, rows))
        encodings.append(Encoding(codec, state_codec, per_column, per_row, 1000 * number, 7,
                                  number << 40, stochastic))
    count = len(table)
    ids = torch.cat([draw_ids(rows, entries, "zipf", generator) for _ in range(count)])
    chunks = torch.tensor([(t, t * entries, entries, t * dim, count * dim) for t in range(count)])
    uniques = unique_segments_reference(ids, chunks,
                                        segments([rows] * count, [BoundsMode.ERROR] * count))
    grads = torch.randint(-8, 9, (entries * count * dim,), generator=generator) / 8.0
    parts.append(torch.full((16 + -offset % 4,), 255, dtype=torch.uint8))
    return EncodedProblem(dim, torch.cat(parts), Blocks.build(torch.tensor(table), encodings), ids,
                          entries, uniques, grads)


# ---------------------------------------------------------------- runs; each returns CPU tensors
def run_codec(codec: str, dim: int, place: Place, *, stochastic: bool = True) -> list[Tensor]:
    """Records of awkward values in a wider matrix of bytes, and what they decode to."""
    generator = torch.Generator().manual_seed(dim)
    values = awkward_values(70, dim, generator).to(place.device)
    rows = torch.randint(0, 1 << 40, (70,), generator=generator).to(place.device)
    width = payload_bytes(codec, dim)
    records = torch.full((70, width + 3), 99, dtype=torch.uint8, device=place.device)
    back = torch.full((70, dim + 2), -7.0, device=place.device)
    # Triton's interpreter computes with numpy, which warns of infinities and NaNs.
    with face(place.face), np.errstate(all="ignore"):
        encode_rows(values, codec, records[:, :width],
                    Rounding(stochastic, rounding_key(1, 2), 0, 5, rows))
        decode_rows(records[:, :width], codec, back[:, :dim])
    return [records.cpu(), back.cpu()]


def run_encoded_update(problem: EncodedProblem, step: StepParameters, place: Place, *,
                       as_cache: bool = False) -> Tensor:
    """The arena after one step; ``as_cache`` gives rows other numbers than their places."""
    problem = problem.to(place.device)
    if as_cache:
        step = replace(step, rows=problem.uniques.ids * 977 + 3)
    with face(place.face):
        update_rows(problem.arena, problem.blocks, problem.uniques, None, problem.grads, step)
    return problem.arena.cpu()


def run_encoded_reads(problem: EncodedProblem, place: Place) -> list[Tensor]:
    """All ids' rows of every table, and weighted bags of three with dropped ids."""
    problem = problem.to(place.device)
    n, dim, count = problem.entries, problem.dim, len(problem.blocks.table)
    out = torch.full((count * n * dim,), -7.0, device=place.device)
    starts = torch.tensor([(t, t * n, n, t * n * dim) for t in range(count)])
    bags, index = n // 3, problem.ids.clone()
    index[4::11] = -1
    weights = (torch.arange(index.numel(), device=place.device) % 5 + 1).float() / 4
    pooled = torch.full((bags * count * dim,), 2.0, device=place.device)
    jobs = torch.tensor([
        (offset, step, dim, bags, t * n, 0, 3, t % 2, t * dim, count * dim, t % 3 == 0, t)
        for t, (offset, step, *_) in enumerate(problem.blocks.table.tolist())])
    with face(place.face):
        gather_rows(problem.arena, problem.blocks, starts, problem.ids, out)
        pool_blocks(problem.arena, jobs, index, None, weights, pooled)
    return [out.cpu(), pooled.cpu()]


def run_moves(dim: int, kind: str, place: Place) -> Tensor:
    """The target's arena after moves from every codec to every other, with states."""
    old = make_encoded(dim, kind, state_codec="bf16").to(place.device)
    new = make_encoded(dim, kind, state_codec="fp16").to(place.device)
    pairs = [(a, b) for a in range(len(CODECS)) for b in range(len(CODECS))]
    count = 5
    where = torch.arange(len(pairs) * count, device=place.device)
    starts = torch.tensor([(a, b, i * count, count) for i, (a, b) in enumerate(pairs)])
    with face(place.face):
        move_rows(MoveEnd(old.arena, old.blocks, where % 60),
                  MoveEnd(new.arena, new.blocks, (where * 7) % 60), starts, rounding_key(3, 4),
                  where * 31)
    return new.arena.cpu()


def all_encoded(place: Place) -> dict[str, Tensor]:
    """Every op on every codec, in both roundings and with odd widths."""
    outputs = {}
    for codec in CODECS:
        for dim in (1, 15, 16, 33):
            for stochastic in (False, True):
                records, back = run_codec(codec, dim, place, stochastic=stochastic)
                outputs[f"{codec} {dim} {stochastic}"] = records
                outputs[f"{codec} {dim} {stochastic} back"] = back.view(torch.int32)
    for dim in (3, 40):
        for kind in EXACT_KINDS:
            for codec in ("fp32", "fp16", "bf16"):
                problem = make_encoded(dim, kind, state_codec=codec)
                step = step_of(kind, key=rounding_key(5, 6))
                outputs[f"{kind} {dim} {codec}"] = run_encoded_update(problem, step, place)
        gathered, pooled = run_encoded_reads(make_encoded(dim), place)
        outputs[f"gather {dim}"] = gathered.view(torch.int32)
        outputs[f"pool {dim}"] = pooled.view(torch.int32)
        outputs[f"moves {dim}"] = run_moves(dim, "adam", place)
    return outputs


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All outputs have the same bits."""
    assert found.keys() == expected.keys()
    for name, output in expected.items():
        different = (found[name] != output).nonzero()
        assert not len(different), f"{name}: {len(different)} differ, first at {different[0]}"


def main(path: str, isa: str) -> None:
    module = native()
    assert module is not None
    assert module.isa() == isa, f"asked for {isa}, got {module.isa()}"
    torch.save(all_encoded(Place("native", "cpu")), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
