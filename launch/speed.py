"""This machine's speed at what training tables comes down to: streams, random rows, whole steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from shardlab.errors import ConfigError
from shardlab.jagged import KeyedJaggedTensor
from shardlab.launch.building import ROW_OPTIMIZERS
from shardlab.ops.registry import describe_faces
from shardlab.optim import RowOptimizer
from shardlab.sharded import EmbeddingBagCollection, shard
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage_bytes import record_layout
from shardlab.storage_specs import RowsSpec

_FP32_BYTES = 4
_STREAM_BYTES = 256 << 20  # several times the caches of the machines we know
_RANDOM_ROWS = 1 << 20
_WARM_UP, _MIN_REPEATS = 1, 3
_LR = 0.01


@dataclass(frozen=True)
class Shape:
    """What is looked up in a step.

    Attributes:
        tables: number of tables, one feature each.
        rows: rows of a table.
        dim: columns of a table.
        batch_size: samples of a step.
        pooling_factor: ids of every bag.
        optimizer: a name of `ROW_OPTIMIZERS`.
    """

    tables: int
    rows: int
    dim: int
    batch_size: int
    pooling_factor: int
    optimizer: str

    @property
    def lookups(self) -> int:
        """Ids of a step."""
        return self.tables * self.batch_size * self.pooling_factor


@dataclass(frozen=True)
class Speed:
    """A measurement: the median of repeated runs.

    Attributes:
        name: what was measured.
        ms: median milliseconds of a run.
        rows: rows read in a run; 0 where there are none.
        moved_bytes: bytes read and written in a run.
    """

    name: str
    ms: float
    rows: int
    moved_bytes: int

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.ms * 1e3

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / self.ms * 1e3


def measure(shape: Shape, seconds: float) -> Iterator[Speed]:
    """Measures one after the other; the faces of the step are this machine's and the reference.

    Args:
        shape: what a step looks up.
        seconds: how long each measurement repeats, at least three runs.

    Raises:
        ConfigError: the shape needs more than half of the machine's memory.
    """
    rule = ROW_OPTIMIZERS[shape.optimizer](lr=_LR)
    layout = record_layout(RowsSpec().home, shape.dim, rule.kind)
    needed = shape.tables * shape.rows * layout.record_bytes + 2 * _STREAM_BYTES
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory // 2:
        raise ConfigError(f"bench: tables of this shape take {needed / 1e9:.1f} GB, more than half "
                          f"of the machine's {memory / 1e9:.1f} GB; lower --rows or --tables")
    yield _stream(seconds)
    yield _random_rows(shape, seconds)
    faces = {face for _, face, _ in describe_faces()}
    yield _step("step, " + " and ".join(sorted(faces)), shape, rule, layout.record_bytes, seconds)
    if faces != {"reference"}:
        with _face("reference"):
            yield _step("step, reference", shape, rule, layout.record_bytes, seconds)


def _median_ms(run: Callable[[], object], seconds: float) -> float:
    for _ in range(_WARM_UP):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MIN_REPEATS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _stream(seconds: float) -> Speed:
    source = torch.ones(_STREAM_BYTES // _FP32_BYTES, device=_device())
    target = torch.empty_like(source)
    ms = _median_ms(lambda: target.copy_(source), seconds)
    return Speed("torch's copy of a large array", ms, 0, 2 * _STREAM_BYTES)


def _random_rows(shape: Shape, seconds: float) -> Speed:
    """torch's own copy of rows at uniformly random places of an array as large as all tables."""
    rows, device = shape.tables * shape.rows, _device()
    table = torch.zeros(rows, shape.dim, device=device)
    ids = torch.randint(rows, (_RANDOM_ROWS,), device=device)
    out = torch.empty(_RANDOM_ROWS, shape.dim, device=device)
    ms = _median_ms(lambda: torch.index_select(table, 0, ids, out=out), seconds)
    return Speed("torch's gather of random rows", ms, _RANDOM_ROWS,
                 2 * _RANDOM_ROWS * shape.dim * _FP32_BYTES)


def _step(name: str, shape: Shape, rule: RowOptimizer, record_bytes: int,
          seconds: float) -> Speed:
    """Lookup, backward and fused update; ids are skewed like u^2, uniform u."""
    torch.manual_seed(0)
    names = [f"t{i}" for i in range(shape.tables)]
    collection = EmbeddingBagCollection([
        EmbeddingBagConfig(num_embeddings=shape.rows, embedding_dim=shape.dim, name=name)
        for name in names])
    model, optimizer = shard(collection, optimizer=rule)
    values = (torch.rand(shape.lookups, dtype=torch.float64).square() * shape.rows).long()
    lengths = torch.full((shape.tables * shape.batch_size,), shape.pooling_factor)
    features = KeyedJaggedTensor(names, values, lengths=lengths).to(_device())
    grad = torch.randn(shape.batch_size, shape.tables * shape.dim, device=_device())

    def run() -> None:
        optimizer.zero_grad()
        model(features).values().backward(grad)
        optimizer.step()

    unique = sum(len(set(part.tolist())) for part in values.chunk(shape.tables))
    # Every id reads its row; every touched row's record is read and written once by the update.
    moved = shape.lookups * shape.dim * _FP32_BYTES + 2 * unique * record_bytes
    return Speed(name, _median_ms(run, seconds), shape.lookups, moved)


@contextmanager
def _face(face: str) -> Iterator[None]:
    before = os.environ.get("SHARDLAB_FACE")
    os.environ["SHARDLAB_FACE"] = face
    try:
        yield
    finally:
        os.environ.pop("SHARDLAB_FACE")
        if before is not None:
            os.environ["SHARDLAB_FACE"] = before
