"""Gather, pool, update and moves of rows of every codec: faces to the bit, and what they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardlab.codecs import CODECS, decode, encode, rounding_key, row_words
from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.moves import move_rows, move_rows_reference
from shardlab.ops.records import MoveEnd
from shardlab.ops.registry import native
from shardlab.ops.rows import gather_rows, pool_blocks, update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Uniques
from shardlab.storage_bytes import payload_bytes
from tests.shardlab.ops.cases import (
    KINDS,
    REFERENCE,
    ROW_PLACES,
    Place,
    face,
    make_problem,
    run_update,
    step_of,
)
from tests.shardlab.ops.encoded_cases import (
    EXACT_KINDS,
    make_encoded,
    run_encoded_reads,
    run_encoded_update,
    run_moves,
)

KEY = rounding_key(5, 6)
FP32 = CODECS["fp32"]


@pytest.fixture(params=ROW_PLACES)
def place(request) -> Place:
    return request.param


def size_for(place: Place) -> dict[str, int]:
    """Rows and entries of a problem: fewer in Triton's interpreter, whose time grows with them."""
    return {"rows": 25, "entries": 33} if place == Place("triton", "cpu") else {}


# ---------------------------------------------------------------- faces
@pytest.mark.parametrize("dim", [1, 3, 16, 40])
def test_reads_equal_the_reference(place, dim):
    problem = make_encoded(dim, **size_for(place))
    for found, expected in zip(run_encoded_reads(problem, place),
                               run_encoded_reads(problem, REFERENCE), strict=True):
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("state_codec", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_update_equals_the_reference_to_the_bit(place, kind, state_codec, stochastic):
    for dim in (1, 17, 40):
        problem = make_encoded(dim, kind, state_codec=state_codec, stochastic=stochastic,
                               **size_for(place))
        step = step_of(kind, key=KEY)
        assert torch.equal(run_encoded_update(problem, step, place),
                           run_encoded_update(problem, step, REFERENCE))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXACT_KINDS])
def test_update_of_other_rules_equals_the_reference_but_for_last_bits(place, kind):
    """A step in fp32 that differs in its last bit can round to the neighbouring code: rarely."""
    problem, step = make_encoded(40, kind, state_codec="bf16"), step_of(kind, key=KEY)
    found, expected = (run_encoded_update(problem, step, where) for where in (place, REFERENCE))
    for block, codec in enumerate(CODECS):
        values = [decode(problem.blocks.payloads(arena, block), codec, 40)
                  for arena in (found, expected)]
        wrong = (values[0] - values[1]).abs() > 2e-6
        assert wrong.float().mean() < (1e-3 if codec != "fp32" else 1e-9)
    assert (found != expected).float().mean() < 0.02


def test_update_takes_the_rows_that_a_cache_names(place):
    problem, step = make_encoded(16), step_of("sgd", key=KEY)
    found, expected = (run_encoded_update(problem, step, where, as_cache=True)
                       for where in (place, REFERENCE))
    assert torch.equal(found, expected)
    assert not torch.equal(found, run_encoded_update(problem, step, place))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("dim", [1, 16, 33])
def test_moves_equal_the_reference(place, kind, dim):
    assert torch.equal(run_moves(dim, kind, place), run_moves(dim, kind, REFERENCE))


def test_nothing_to_do(place):
    def none(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64)

    arena = torch.ones(8, dtype=torch.uint8, device=place.device)
    out, ids = torch.ones(4, device=place.device), none(0).to(place.device)
    blocks = Blocks(none(0, 6), none(0, 8))
    nothing = Uniques(ids, torch.zeros(1, dtype=torch.int64),
                      torch.zeros(1, dtype=torch.int64, device=place.device), ids)
    with face(place.face):
        gather_rows(arena, blocks, none(0, 4), ids, out)
        pool_blocks(arena, none(0, 12), ids, None, None, out)
        update_rows(arena, blocks, nothing, None, out, StepParameters("sgd", 0.1))
        end = MoveEnd(arena, blocks, ids)
        move_rows(end, end, none(0, 4))
    assert torch.equal(arena.cpu(), torch.ones(8, dtype=torch.uint8))
    assert torch.equal(out.cpu(), torch.ones(4))


# ---------------------------------------------------------------- meaning
def test_fp32_blocks_step_alike_with_and_without_encodings(place):
    for kind in KINDS:
        problem = make_problem((16, 17), kind=kind, skew="zipf")
        encodings = [problem.blocks.encoding(b) for b in range(2)]
        encoded = replace(problem, blocks=Blocks.build(problem.blocks.table, encodings))
        step = step_of(kind)
        found, expected = (run_update(p, step, place) for p in (encoded, problem))
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "fp32"])
def test_update_without_gradient_changes_nothing(place, codec):
    problem = make_encoded(24, "row_wise_adagrad", state_codec="fp16")
    problem = replace(problem, grads=torch.zeros_like(problem.grads))
    after = run_encoded_update(problem, step_of("row_wise_adagrad", key=KEY), place)
    assert torch.equal(after, problem.arena)


@pytest.mark.parametrize("codec", CODECS)
def test_small_steps_arrive_on_the_mean(codec):
    """A hundred steps of a hundredth of a code's step: nearest rounding would not move at all."""
    rows, dim = 4000, 16
    start = torch.zeros(rows, dim) + 0.75
    start[:, 0] = 1.0  # the largest, which sets the scale
    width, steps = payload_bytes(codec, dim), 100
    step = {"fp32": 1e-4, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4, "int8": 1 / 127,
            "int4": 1 / 7, "fp8_e5m2": 2.0**-3}[codec] / 100
    arena = encode(start, codec, row_words(1, torch.arange(rows))).view(-1).clone()
    begin = decode(arena.view(rows, width), codec, dim).double().mean(0)
    blocks = Blocks.build(torch.tensor([(0, width, 0, 0, dim, rows)]), [Encoding(codec)])
    ids = torch.arange(rows)
    uniques = Uniques(ids, torch.tensor([0, rows]), torch.arange(rows + 1), ids * dim)
    grads = torch.ones(rows, dim)
    grads[:, 0] = 0
    with face("native" if native() else "reference"):
        for number in range(steps):
            update_rows(arena, blocks, uniques, None, grads.view(-1),
                        StepParameters("sgd", step, key=rounding_key(3, number)))
    moved = begin - decode(arena.view(rows, width), codec, dim).double().mean(0)
    # Every step rounds by less than a code's step; a hundred of them by ten, a mean of rows less.
    assert moved[1:].sub(100 * step).abs().max() < 100 * step * 5 * 10 / rows**0.5


def test_part_of_a_table_steps_as_the_whole_does():
    """Blocks cut by rows and columns: fp16 rows and element-wise states take the table's bits."""
    rows, dim, kind = 40, 32, "adagrad"
    generator = torch.Generator().manual_seed(1)
    values, state = torch.randn(rows, dim, generator=generator), torch.rand(rows, dim)
    grads = torch.randn(rows, dim, generator=generator)

    def run(r0: int, r1: int, c0: int, c1: int) -> tuple[Tensor, Tensor]:
        payload = encode(values[r0:r1, c0:c1], "fp16")
        states = encode(state[r0:r1, c0:c1], "bf16")
        arena = torch.cat([payload.reshape(-1), states.reshape(-1)])
        n, width = r1 - r0, c1 - c0
        table = torch.tensor([(0, 2 * width, payload.numel(), 2 * width, width, n)])
        blocks = Blocks.build(table, [Encoding("fp16", "bf16", 1, 0, r0, c0, 99)])
        ids = torch.arange(n)
        uniques = Uniques(ids, torch.tensor([0, n]), torch.arange(n + 1), ids * width)
        update_rows(arena, blocks, uniques, None, grads[r0:r1, c0:c1].reshape(-1),
                    step_of(kind, key=KEY))
        return blocks.payloads(arena, 0), blocks.states(arena, 0)

    whole = run(0, rows, 0, dim)
    for r0, r1, c0, c1 in ((0, 40, 0, 16), (0, 40, 16, 32), (13, 40, 5, 30)):
        for part, all_of_it in zip(run(r0, r1, c0, c1), whole, strict=True):
            assert torch.equal(part, all_of_it[r0:r1, 2 * c0:2 * c1])


def test_fill_and_write_back_of_an_unchanged_row_changes_nothing(place):
    """From every codec to fp32 and back, states in bf16 to fp32 and back."""
    home = make_encoded(20, "adam", state_codec="bf16").to(place.device)
    cache = make_encoded(20, "adam", state_codec="fp32").to(place.device)
    count = len(CODECS)
    there = torch.arange(60, device=place.device).repeat(count)
    fill = torch.tensor([(b, FP32, 60 * b, 60) for b in range(count)])
    slots = (there * 7) % 60
    before = home.arena.clone()
    with face(place.face):
        for b in range(count):
            part = fill[b:b + 1]
            move_rows(MoveEnd(home.arena, home.blocks, there),
                      MoveEnd(cache.arena, cache.blocks, slots), part)
            back = part[:, [1, 0, 2, 3]]
            move_rows(MoveEnd(cache.arena, cache.blocks, slots),
                      MoveEnd(home.arena, home.blocks, there), back, rounding_key(8, b), there)
    assert torch.equal(home.arena, before)


def test_records_may_lie_side_by_side(place):
    """Payload and state in one span, as on a block device; bytes between them stay."""
    rows, dim, width = 30, 12, 13 + 2 + 2
    block = make_encoded(dim, "row_wise_adagrad", state_codec="fp16", rows=rows)
    number = list(CODECS).index("int8")
    staging = torch.full((rows * width,), 77, dtype=torch.uint8)
    beside = Blocks.build(torch.tensor([(0, width, 14, width, dim, rows)]),
                          [Encoding("int8", "fp16", 0, 1)])
    places = torch.arange(rows)
    with face("native" if place.face == "native" else "reference"):
        move_rows(MoveEnd(block.arena, block.blocks, places),
                  MoveEnd(staging, beside, places.flip(0).contiguous()),
                  torch.tensor([(number, 0, 0, rows)]))
    found = staging.view(rows, width).flip(0)
    assert torch.equal(found[:, :13], block.blocks.payloads(block.arena, number))
    assert torch.equal(found[:, 14:16], block.blocks.states(block.arena, number))
    assert bool((found[:, [13, 16]] == 77).all())


def test_moves_between_devices_take_the_reference(monkeypatch):
    old, new = make_encoded(8), make_encoded(8)
    where = torch.arange(10)
    monkeypatch.setattr("shardlab.ops.moves.face_of", lambda op, device: "native")
    meta = MoveEnd(old.arena.to("meta"), old.blocks, where.to("meta"))
    with pytest.raises(NotImplementedError):  # reading a meta tensor, in plain torch
        move_rows(meta, MoveEnd(new.arena, new.blocks, where), torch.tensor([(0, 1, 0, 10)]))
    move_rows_reference(MoveEnd(old.arena, old.blocks, where),
                        MoveEnd(new.arena, new.blocks, where), torch.tensor([(0, 0, 0, 10)]))
    assert torch.equal(new.arena, old.arena)


def test_moves_refuse_what_a_kernel_would_misread():
    problem = make_encoded(8)
    good = MoveEnd(problem.arena, problem.blocks, torch.arange(4))
    part = torch.tensor([(0, 1, 0, 4)])
    with pytest.raises(TypeError, match=r"source.places: expected a contiguous torch.int64"):
        move_rows(replace(good, places=torch.arange(4).int()), good, part)
    with pytest.raises(ValueError, match=r"the target's blocks have no encodings"):
        move_rows(good, replace(good, blocks=Blocks(problem.blocks.table)), part)
    with pytest.raises(TypeError, match=r"rows: expected a contiguous torch.int64"):
        move_rows(good, good, part, rows=torch.ones(4))


def test_encoding_survives_its_numbers():
    encoding = Encoding("int4", "bf16", 2, 1, 1 << 40, 64, -5, False)
    assert Encoding.of(encoding.numbers()) == encoding
    blocks = Blocks(torch.tensor([(0, 64, 0, 68, 16, 3)]))
    assert blocks.encoding(0) == Encoding(element_states=1, row_states=1)
