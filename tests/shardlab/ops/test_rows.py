"""Every face of gather, pool, sum and update against the reference, odd shapes included."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shardlab.ops.blocks import Blocks
from shardlab.ops.registry import native
from shardlab.ops.rows import gather_rows, pool_rows, sum_rows, update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Uniques
from tests.shardlab.ops.all_outputs import all_outputs
from tests.shardlab.ops.cases import (
    DIMS,
    KINDS,
    REFERENCE,
    ROW_PLACES,
    TOLERANCE,
    Place,
    PoolOptions,
    assert_close,
    face,
    make_problem,
    run_gather,
    run_pool,
    run_sum,
    run_update,
    step_of,
)

WIDTHS = [pytest.param((dim,), id=f"dim={dim}") for dim in DIMS] + [pytest.param(DIMS, id="mixed")]
NATIVE = Place("native", "cpu")
needs_native = pytest.mark.skipif(native() is None, reason="the native library is not built")


@pytest.fixture(params=ROW_PLACES)
def place(request) -> Place:
    return request.param


# ---------------------------------------------------------------- gather
@pytest.mark.parametrize("dims", WIDTHS)
def test_gather_equals_reference(place, dims):
    problem = make_problem(dims, kind="row_wise_adagrad")
    assert torch.equal(run_gather(problem, place), run_gather(problem, REFERENCE))


@pytest.mark.parametrize("entries", [0, 1], ids=lambda n: f"ids={n}")
def test_gather_of_few_ids(place, entries):
    problem = make_problem((4, 17), entries=entries, rows=1)
    assert torch.equal(run_gather(problem, place), run_gather(problem, REFERENCE))


# ---------------------------------------------------------------- pool
POOL_OPTIONS = [
    pytest.param(PoolOptions(), id="ragged"),
    pytest.param(PoolOptions(ragged=False), id="fixed"),
    pytest.param(PoolOptions(weighted=True), id="ragged-weighted"),
    pytest.param(PoolOptions(mean=True, dropped=True), id="ragged-mean-dropped"),
    pytest.param(PoolOptions(ragged=False, mean=True, weighted=True, add=True, dropped=True),
                 id="fixed-mean-weighted-add-dropped"),
    pytest.param(PoolOptions(add=True), id="ragged-add"),
]


@pytest.mark.parametrize("options", POOL_OPTIONS)
def test_pool_equals_reference(place, options):
    problem = make_problem(DIMS, kind="adagrad", skew="zipf")
    assert_close(run_pool(problem, options, place), run_pool(problem, options, REFERENCE))


@pytest.mark.parametrize("dims", WIDTHS[:-1])
def test_pool_of_any_width(place, dims):
    problem, options = make_problem(dims), PoolOptions(mean=True, weighted=True)
    assert_close(run_pool(problem, options, place), run_pool(problem, options, REFERENCE))


@pytest.mark.parametrize("entries", [0, 1], ids=lambda n: f"ids={n}")
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "fixed"])
def test_pool_of_few_ids(place, entries, ragged):
    problem, options = make_problem((4, 17), entries=entries), PoolOptions(ragged, mean=True)
    assert torch.equal(run_pool(problem, options, place), run_pool(problem, options, REFERENCE))


# ---------------------------------------------------------------- sums
@pytest.mark.parametrize("dims", WIDTHS)
def test_sum_equals_reference(place, dims):
    problem = make_problem(dims, skew="zipf")
    assert_close(run_sum(problem, 1.0, place), run_sum(problem, 1.0, REFERENCE))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("skew", ["uniform", "zipf", "one"])
def test_sum_of_column_pieces(place, skew, weighted):
    problem = make_problem((1, 17, 24), skew=skew, weighted=weighted)
    assert_close(run_sum(problem, 0.25, place, halves=True),
                 run_sum(problem, 0.25, REFERENCE, halves=True))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_sum_of_hot_ids(place, weighted):
    """Runs long enough for chunks, beginning and ending anywhere among them, in shared pieces."""
    problem = make_problem((5, 4, 24), rows=7, entries=700, skew="zipf", weighted=weighted)
    found, expected = (run_sum(problem, 1.0, where, halves=True) for where in (place, REFERENCE))
    # Sums of up to 700 terms of about 1 in another order: some 10 units in the last place of 30.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("place", [p for p in ROW_PLACES if p.id != "reference-cuda"],
                         indirect=True)
def test_sum_adds_in_entry_order(place):
    """Bit for bit what fp32 additions one after the other give."""
    problem = make_problem((17, 24), rows=9, entries=60, skew="zipf")
    starts, sources = problem.uniques.starts.tolist(), problem.uniques.sources.tolist()
    assert max(np.diff(starts)) > 2
    splits, grads = problem.uniques.splits.tolist(), problem.grads.numpy()
    expected = run_sum(problem, 1.0, REFERENCE).numpy()
    at = 5
    for t, dim in enumerate(problem.dims):
        for u in range(splits[t], splits[t + 1]):
            total = np.zeros(dim, dtype=np.float32)
            for k in range(starts[u], starts[u + 1]):
                total = total + grads[sources[k]:sources[k] + dim]
            expected[at:at + dim] = total
            at += dim + 3
    assert np.array_equal(run_sum(problem, 1.0, place).numpy(), expected)


# ---------------------------------------------------------------- update
@pytest.mark.parametrize("changes", [
    pytest.param({}, id="plain"),
    pytest.param({"scale": 0.25}, id="scale"),
    pytest.param({"clip_value": 0.5}, id="clip"),
    pytest.param({"scale": 2.0, "clip_value": 0.7, "weight_decay": 0.01}, id="all"),
])
@pytest.mark.parametrize("kind", KINDS)
def test_update_equals_reference(place, kind, changes):
    problem = make_problem((4, 17, 24), kind=kind, skew="zipf", weighted="scale" in changes)
    step = step_of(kind, **changes)
    assert_close(run_update(problem, step, place), run_update(problem, step, REFERENCE))


@pytest.mark.parametrize("dims", WIDTHS)
@pytest.mark.parametrize("kind", ["row_wise_adagrad", "adam"])
def test_update_of_any_width(place, kind, dims):
    problem, step = make_problem(dims, kind=kind), step_of(kind)
    assert_close(run_update(problem, step, place), run_update(problem, step, REFERENCE))


@pytest.mark.parametrize("kind", ["sgd", "row_wise_adam"])
def test_update_of_hot_ids(place, kind):
    problem = make_problem((5, 4, 24), kind=kind, rows=7, entries=700, skew="zipf")
    step = step_of(kind, scale=1 / 700)
    assert_close(run_update(problem, step, place), run_update(problem, step, REFERENCE))


@pytest.mark.parametrize("kind", ["adam", "row_wise_adam"])
def test_first_moments_of_adam(place, kind):
    """From zero state they are (1 - beta) of the gradient; 1 - 0.999 in fp32 is off by 1.3e-5."""
    problem = make_problem((16,), kind=kind, rows=9, entries=12)
    problem.blocks.state(problem.arena, 0).zero_()
    found, expected = (run_update(problem, step_of(kind), where).view(torch.uint8)
                       for where in (place, REFERENCE))
    torch.testing.assert_close(problem.blocks.state(found, 0), problem.blocks.state(expected, 0),
                               rtol=1e-6, atol=0)
    assert_close(problem.blocks.rows(found, 0), problem.blocks.rows(expected, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_update_touches_only_its_rows(place, kind):
    problem = make_problem((4, 17), kind=kind, rows=60, entries=9)
    found = run_update(problem, step_of(kind), place)
    untouched = torch.ones(found.numel(), dtype=torch.bool)
    splits = problem.uniques.splits.tolist()
    for t, (row_offset, row_bytes, state_offset, state_bytes, _, _) in enumerate(
            problem.blocks.table.tolist()):
        for row in problem.uniques.ids[splits[t]:splits[t + 1]].tolist():
            for offset, size in ((row_offset, row_bytes), (state_offset, state_bytes)):
                untouched[(offset + row * size) // 4:(offset + (row + 1) * size) // 4] = False
    before = problem.arena.view(torch.float32)
    assert torch.equal(found[untouched].view(torch.int32), before[untouched].view(torch.int32))
    assert not torch.equal(found[~untouched], before[~untouched])


def test_update_keeps_nan_under_clipping(place):
    """A broken gradient must show, not turn into the bound."""
    problem = make_problem((4,), rows=5, entries=3)
    problem.grads[1] = float("nan")
    step = step_of("sgd", clip_value=0.5)
    found, expected = (run_update(problem, step, where) for where in (place, REFERENCE))
    assert_close(found, expected)
    assert int(found.isnan().sum()) == int(problem.arena.view(torch.float32).isnan().sum()) + 1


@pytest.mark.parametrize("entries", [0, 1], ids=lambda n: f"ids={n}")
def test_update_of_few_ids(place, entries):
    problem = make_problem((4, 17), kind="adagrad", rows=1, entries=entries)
    step = step_of("adagrad")
    assert_close(run_update(problem, step, place), run_update(problem, step, REFERENCE))


def test_nothing_to_do(place):
    """No segment, no job, no piece, no block: every op returns and writes nothing."""
    def none(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int64)

    out = torch.ones(4, device=place.device)
    ids, arena = none(0).to(place.device), out.view(torch.uint8)
    nothing = Uniques(ids, torch.zeros(1, dtype=torch.int64), torch.zeros_like(none(1)).to(
        place.device), ids)
    with face(place.face):
        gather_rows(arena, Blocks(none(0, 6)), none(0, 4), ids, out)
        pool_rows(out, none(0, 11), ids, None, None, out)
        sum_rows(out, nothing, None, none(0, 6), 1.0, out)
        update_rows(arena, Blocks(none(0, 6)), nothing, None, out, StepParameters("sgd", 0.1))
    assert torch.equal(out.cpu(), torch.ones(4))


# ---------------------------------------------------------------- rules, from the papers
@pytest.mark.parametrize("kind", KINDS)
def test_reference_step_follows_the_formula(kind):
    """One row of two columns, by hand in fp64."""
    problem = make_problem((2,), kind=kind, rows=1, entries=2)
    step = step_of(kind, weight_decay=0.01)
    def parts(arena: torch.Tensor) -> list[np.ndarray]:
        views = problem.blocks.rows(arena, 0), problem.blocks.state(arena, 0)
        return [view.view(-1).double().numpy() for view in views]

    (w, state), after = parts(problem.arena), run_update(problem, step, REFERENCE)
    after = np.concatenate(parts(after.view(torch.uint8)))
    g = problem.grads.view(2, 2).sum(0).double().numpy()
    mean = (g**2).mean()
    if kind == "sgd":
        expected = [*(w - 0.1 * (g + 0.01 * w))]
    elif kind == "adagrad":
        h = state + g**2
        expected = [*(w - 0.1 * g / (np.sqrt(h) + 1e-3)), *h]
    elif kind == "row_wise_adagrad":
        h = state + mean
        expected = [*(w - 0.1 * g / (np.sqrt(h) + 1e-3)), *h]
    else:
        m = 0.9 * state[:2] + 0.1 * g
        v = 0.999 * state[2:] + 0.001 * (g**2 if kind == "adam" else mean)
        root = np.sqrt(v / (1 - 0.999**3)) + 1e-3
        expected = [*(w - 0.1 * m / (1 - 0.9**3) / root), *m, *v]
    np.testing.assert_allclose(after, expected, rtol=1e-6)


# ---------------------------------------------------------------- threads, instruction sets
@needs_native
def test_native_is_bit_identical_for_any_threads():
    before, results = torch.get_num_threads(), []
    problem = make_problem(DIMS, kind="adam", rows=200, entries=300, skew="zipf", weighted=True)
    options = PoolOptions(weighted=True, mean=True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([run_gather(problem, NATIVE), run_pool(problem, options, NATIVE),
                            run_sum(problem, 0.3, NATIVE, halves=True),
                            run_update(problem, step_of("adam", clip_value=1.0), NATIVE)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("isa", [] if native() is None else native().isas())
def test_every_instruction_set_equals_reference(isa, tmp_path):
    """The instruction set is chosen once a process, hence another process for each."""
    path, root = tmp_path / "outputs.pt", Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-m", "tests.shardlab.ops.all_outputs", str(path), isa],
                   check=True, cwd=root, timeout=120,
                   env={**os.environ, "SHARDLAB_ISA": isa, "SHARDLAB_FACE": "native"})
    found, expected = torch.load(path, weights_only=True), all_outputs(REFERENCE)
    assert found.keys() == expected.keys()
    for name, output in expected.items():
        torch.testing.assert_close(found[name], output, **TOLERANCE, equal_nan=True,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("place", [p for p in ROW_PLACES if p.id == "triton-cuda"], indirect=True)
def test_triton_is_bit_identical_on_repetition(place):
    problem = make_problem(DIMS, kind="adam", rows=200, entries=3000, skew="zipf", weighted=True)
    first, second = (run_update(problem, step_of("adam"), place) for _ in range(2))
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))


@needs_native
def test_native_reads_rows_beyond_2_to_the_31_bytes():
    """Offsets are 64 bit: a block of 2^31 + 64 bytes, of which two pages are ever touched."""
    rows, row_bytes = (1 << 25) + 1, 64
    arena = torch.empty(rows * row_bytes, dtype=torch.uint8)
    blocks = Blocks(torch.tensor([(0, row_bytes, 0, 0, 16, rows)]))
    last = blocks.rows(arena, 0)[-1:]
    last.copy_(torch.arange(16.0))
    ids, out = torch.tensor([rows - 1]), torch.empty(16)
    uniques = Uniques(ids, torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0]))
    with face("native"):
        gather_rows(arena, blocks, torch.tensor([(0, 0, 1, 0)]), ids, out)
        assert torch.equal(out, torch.arange(16.0))
        update_rows(arena, blocks, uniques, None, torch.ones(16), StepParameters("sgd", 1.0))
        job = torch.tensor([(0, 16, 16, 1, 0, 0, 1, 0, 0, 16, 0)])
        pool_rows(arena.view(torch.float32), job, ids, None, None, out)
    assert torch.equal(out, torch.arange(16.0) - 1)


@pytest.mark.gpu
def test_triton_reads_rows_beyond_2_to_the_31_elements():
    rows = (1 << 27) + 1
    blocks = Blocks(torch.tensor([(0, 64, 0, 0, 16, rows)]))
    arena = torch.empty(rows * 64, dtype=torch.uint8, device="cuda")
    blocks.rows(arena, 0)[-1:].copy_(torch.arange(16.0))
    ids, out = torch.tensor([rows - 1], device="cuda"), torch.empty(16, device="cuda")
    with face("triton"):
        gather_rows(arena, blocks, torch.tensor([(0, 0, 1, 0)]), ids, out)
    assert torch.equal(out.cpu(), torch.arange(16.0))


def test_problem_copies_share_nothing():
    """`to` copies: no face sees what another has written."""
    problem = make_problem((4,))
    copy = replace(problem).to("cpu")
    assert copy.arena.data_ptr() != problem.arena.data_ptr()
