"""Several tensor trains in one call: what one train at a time gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.registry import has_triton
from shardlab.ops.rounding import Rounding
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import tensor_train_gradients_reference, tensor_train_rows_reference
from shardlab.ops.tensor_train_batch import (
    CoreSlices,
    all_slices,
    batch_gradients,
    batch_rows,
    batch_steps,
    moves_every_slice,
    step_slices,
)
from shardlab.ops.tensor_train_types import Workspace
from shardlab.storage_bytes import OPTIMIZER_STATE, payload_bytes
from tests.shardlab.ops.test_tensor_train import make, some_ids

FACES = ["native", "reference", *(["triton"] if has_triton() else [])]


@pytest.fixture(params=FACES)
def face(request, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", request.param)
    return request.param


def build():
    """Trains of 2, 3 and 4 cores and odd sizes; the second one has no ids."""
    trains = [make(100, 13, 5, 2), make(50, 4, 3), make(997, 12, 6, 3, seed=1), make(1, 1, 1, 2),
              make(300, 8, 3, 4, seed=2)]
    ids = [some_ids(100, 6), torch.empty(0, dtype=torch.int64), some_ids(997, 9, seed=1),
           torch.tensor([0]), some_ids(300, 5)]
    edges = [0]
    for one in ids:
        edges.append(edges[-1] + one.numel())
    return trains, ids, edges


def test_rows_and_gradients_equal_those_of_each_train(face):
    trains, ids, edges = build()
    columns = [13, 4, 12, 1, 8]
    sizes = [len(one) * width for one, width in zip(ids, columns, strict=True)]
    out, workspace = torch.full((sum(sizes),), torch.nan), Workspace()
    batch_rows(trains, torch.cat(ids), edges, out, workspace)
    grads = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(3))
    order = [(4, 3), (0, 0), (2, 1), (1, 0), (2, 0), (3, 1), (4, 1), (0, 1), (1, 2), (4, 0), (2, 2),
             (3, 0), (1, 1), (4, 2)]
    every = [True, True, False, False, False]
    found = batch_gradients(trains, torch.cat(ids), edges, grads, order, every, workspace)
    wanted = []
    for train, one, rows, given, width in zip(trains, ids, out.split(sizes), grads.split(sizes),
                                              columns, strict=True):
        torch.testing.assert_close(rows.view(-1, width), tensor_train_rows_reference(train, one))
        wanted.append(tensor_train_gradients_reference(train, one, given.view(-1, width)))
    assert found.splits.tolist()[-1] == found.ids.numel() == found.sources.numel()
    for place, (number, core) in enumerate(order):
        touched, values = wanted[number].touched[core], wanted[number].grads[core]
        if every[number] and len(ids[number]):
            touched, values = all_slices(trains[number].cores[core].shape[0], touched, values)
        mine, grads_found = found.core(place, trains[number].cores[core].shape[1])
        assert torch.equal(mine, touched)
        torch.testing.assert_close(grads_found, values, rtol=1e-5, atol=1e-5)


def test_a_batch_may_shrink_and_grow(face):
    """What an earlier call left behind is not seen."""
    workspace = Workspace()
    for count in (4, 1, 30, 2):
        train, ids = make(997, 12, 17), some_ids(997, count, seed=count)
        out = torch.empty(ids.numel() * 12)
        if face == "triton":
            train = make(997, 12, 3)
        batch_rows([train], ids, [0, ids.numel()], out, workspace)
        torch.testing.assert_close(out.view(-1, 12), tensor_train_rows_reference(train, ids),
                                   rtol=1e-4, atol=1e-4)


def test_every_core_must_be_listed(monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", "native")
    train, workspace, ids = make(100, 12, 5), Workspace(), torch.tensor([1])
    out = torch.empty(12)
    batch_rows([train], ids, [0, 1], out, workspace)
    with pytest.raises(ValueError, match="order: core 1 of train 0 is missing; list every core"):
        batch_gradients([train], ids, [0, 1], out, [(0, 0), (0, 2)], [False], workspace)


def test_wrong_dtypes_are_refused():
    train, workspace = make(100, 12, 5), Workspace()
    with pytest.raises(TypeError, match=r"out: expected a contiguous torch.float32"):
        batch_rows([train], torch.tensor([1]), [0, 1], torch.empty(12, dtype=torch.float64),
                   workspace)
    with pytest.raises(TypeError, match=r"grads: expected a contiguous torch.float32"):
        batch_gradients([train], torch.tensor([1]), [0, 1], torch.empty(12).double(), [(0, 0)],
                        [False], workspace)


# ---------------------------------------------------------------- steps
def stepped(dtype, kind):
    """Cores of the trains of `build` in one memory, the last train's apart, and the trains."""
    trains, ids, edges = build()
    per_column, per_row = OPTIMIZER_STATE[kind]
    memories = []
    for part in ([(t, core) for t in range(4) for core in range(len(trains[t].cores))],
                 [(4, core) for core in (2, 0, 3, 1)]):
        rows, offset = [], 0
        for t, core in part:
            slices, elements = trains[t].cores[core].shape
            state = 4 * (per_column * elements + per_row)
            payload = payload_bytes(dtype, elements)
            rows.append([offset + slices * state, payload, offset, state, elements, slices])
            offset += slices * (state + payload)
        encodings = [Encoding(dtype, "fp32", per_column, per_row, 3, 5, 11 * t + core)
                     for t, core in part]
        memory = CoreSlices(torch.zeros(offset, dtype=torch.uint8),
                            Blocks.build(torch.tensor(rows), encodings), part, 1 + len(memories))
        for block, (t, core) in enumerate(part):
            encode_rows(trains[t].cores[core], dtype,
                        memory.blocks.payloads(memory.arena, block), Rounding())
        memories.append(memory)
    cores = [[torch.empty_like(core) for core in train.cores] for train in trains]
    for memory in memories:
        for block, (t, core) in enumerate(memory.owners):
            if dtype == "fp32":  # the memory itself, as the storage hands it over
                cores[t][core] = memory.blocks.rows(memory.arena, block)
            else:
                decode_rows(memory.blocks.payloads(memory.arena, block), dtype, cores[t][core])
    trains = [replace(train, cores=tuple(own)) for train, own in zip(trains, cores, strict=True)]
    return trains, memories, torch.cat(ids), edges


def take_steps(kind, dtype, *, threads=1, together=True, decay=0.0):
    """The memories after two steps of `batch_steps`, or of gradients and `step_slices`."""
    trains, memories, ids, edges = stepped(dtype, kind)
    sizes = sum((edges[t + 1] - edges[t]) * width for t, width in enumerate([13, 4, 12, 1, 8]))
    grads = torch.randn(sizes, generator=torch.Generator().manual_seed(3))
    workspace, before = Workspace(), torch.get_num_threads()
    torch.set_num_threads(threads)
    for number in (1, 2):
        step = StepParameters(kind, 0.1, eps=1e-8, beta1=0.9, beta2=0.99, weight_decay=decay,
                              bias1=1 - 0.9**number, bias2=1 - 0.99**number, key=number)
        batch_rows(trains, ids, edges, torch.empty_like(grads), workspace)
        if together:
            batch_steps(trains, ids, edges, grads, memories, step, workspace)
            continue
        order = [owner for memory in memories for owner in memory.owners]
        every = [moves_every_slice(step)] * len(trains)
        found = batch_gradients(trains, ids, edges, grads, order, every, workspace)
        first = 0
        for memory in memories:
            step_slices(memory, found, first, step)
            first += len(memory.owners)
    torch.set_num_threads(before)
    return torch.cat([memory.arena for memory in memories])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(OPTIMIZER_STATE))
def test_steps_equal_gradients_and_then_steps(kind, dtype, monkeypatch):
    """Bit for bit, for any number of threads: trains of 2, 3 and 4 cores, one without ids."""
    monkeypatch.setenv("SHARDLAB_FACE", "native")
    decay = 0.01 if kind == "sgd" else 0.0
    wanted = take_steps(kind, dtype, together=False, decay=decay)
    for threads in (1, 3):
        assert torch.equal(take_steps(kind, dtype, threads=threads, decay=decay), wanted)
    monkeypatch.setenv("SHARDLAB_FACE", "reference")
    if dtype == "fp32":
        torch.testing.assert_close(take_steps(kind, dtype, decay=decay).view(torch.float32),
                                   wanted.view(torch.float32), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("face", ["native", "reference"])
def test_trains_without_cores_to_step_stay(face, monkeypatch):
    monkeypatch.setenv("SHARDLAB_FACE", face)
    trains, memories, ids, edges = stepped("fp32", "sgd")
    sizes = sum((edges[t + 1] - edges[t]) * width for t, width in enumerate([13, 4, 12, 1, 8]))
    grads, workspace = torch.ones(sizes), Workspace()
    batch_rows(trains, ids, edges, torch.empty_like(grads), workspace)
    first, second = memories[0].arena.clone(), memories[1].arena.clone()
    batch_steps(trains, ids, edges, grads, memories[1:], StepParameters("sgd", 0.1), workspace)
    assert torch.equal(memories[0].arena, first)
    assert not torch.equal(memories[1].arena, second)
