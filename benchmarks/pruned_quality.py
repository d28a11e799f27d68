"""Quality of pruned tables beside other ways to save the same bytes, on a Criteo sample.

    python benchmarks/pruned_quality.py --data criteo_kaggle_123k.parquet --seeds 0 1 2
    python benchmarks/pruned_quality.py --synthetic 400000 --seeds 0 1 2

Tables have a row for every distinct id of the sample. With `--synthetic ROWS`, clicks of the
planted teacher, tables are as large as Criteo's, 33.8 million rows, of which the training part
touches some. All methods train one epoch of the same DLRM on the same batches with row-wise
Adagrad, and are validated on the last ninth in time, or on 100,000 more clicks. Budgets are shares
of the dense fp32 weights, of rows that the training part touches alone where clicks are synthetic,
and count everything that a method holds: weights, optimiser state, and for pruned tables the index,
utilities and the sketch. `--dtype` is that of the rows of every method but the dense table;
`--index` counts what finds the rows of frequency and magnitude, too.

    pruned       this project, K chunks
    rows         this project, K = 1: rows are admitted and evicted whole
    dimension    fewer columns for every row
    hashing      fewer rows, ids modulo them
    qr           quotient and remainder tables, multiplied (arXiv 1909.02107)
    frequency    rows for the ids that are most frequent in the training part; others share one.
                 `--counted 0.25` counts the first quarter of that part alone
    magnitude    the dense table; after training, rows of the smallest norm become zeros
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.data.synthetic import SyntheticCriteoSource
from shardlab.presets import CRITEO_KAGGLE_CARDINALITIES, CRITEO_SPARSE_NAMES
from shardlab.train.metrics import exact_auc

DIM, STATE_BYTES = 16, 4
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
#: Of a row with its state; int8 rows have a byte of scale.
ROW_BYTES = {dtype: DIM * each + (dtype == "int8") + STATE_BYTES
             for dtype, each in ELEMENT_BYTES.items()}
#: Of a key and a place, in 8 slots for 7 rows.
INDEX_BYTES = 12 * 8 / 7
#: Clicks of the teacher that validate.
SYNTHETIC_VALIDATION = 100_000
METHODS = ("pruned", "rows", "dimension", "hashing", "qr", "frequency", "magnitude")


@dataclass(frozen=True)
class Sample:
    """The whole sample: dense fp32 [n, 13], ids int64 [26, n], labels fp32 [n], rows by feature;
    rows that train, of the sample and of all tables.
    """

    dense: Tensor
    ids: Tensor
    labels: Tensor
    rows: list[int]
    train: int
    touched: int


def read_sample(path: str, *, tune: bool = False) -> Sample:
    """Reads the parquet file; ids are numbered as they first occur.

    Args:
        path: of the file.
        tune: the training part alone, whose last ninth validates: for choices between options.
    """
    table = pq.read_table(path)
    count = table.num_rows
    dense = np.stack([np.log1p(np.maximum(pc.fill_null(table[f"I{i}"], 0).to_numpy(), 0))
                      for i in range(1, 14)], 1)
    ids, rows = [], []
    for i in range(1, 27):
        codes = pc.dictionary_encode(pc.fill_null(table[f"C{i}"], "").combine_chunks())
        ids.append(codes.indices.to_numpy())
        rows.append(len(codes.dictionary))
    if tune:
        count = count * 8 // 9
    labels = torch.tensor(table["label"].to_numpy()[:count], dtype=torch.float32)
    return Sample(torch.tensor(dense[:count], dtype=torch.float32),
                  torch.tensor(np.stack(ids)[:, :count]).long(), labels, rows, count * 8 // 9,
                  sum(rows))


def draw_sample(count: int) -> Sample:
    """Clicks of the planted teacher (`shardlab.data.synthetic`), ``count`` of them to train."""
    sizes = dict(zip(CRITEO_SPARSE_NAMES, CRITEO_KAGGLE_CARDINALITIES, strict=True))
    drawn = SyntheticCriteoSource(sizes).read(0, count + SYNTHETIC_VALIDATION)
    ids = torch.stack([torch.from_numpy(bags.values) for bags in drawn.bags])
    touched = sum(each[:count].unique().numel() for each in ids)
    return Sample(torch.from_numpy(drawn.dense), ids, torch.from_numpy(drawn.labels),
                  list(sizes.values()), count, touched)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    """DLRM of arXiv 1906.00091 whose features may come as a product of several tables."""

    def __init__(self, tables: list[sl.EmbeddingBagConfig], dim: int, parts: int) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection(tables)
        self.dim, self.parts = dim, parts
        features = len(tables) // parts + 1
        self.bottom = mlp(13, 64, dim)
        self.top = nn.Sequential(mlp(dim + features * (features - 1) // 2, 64, 32),
                                 nn.Linear(32, 1))
        self.register_buffer("pairs", torch.triu_indices(features, features, 1))

    def forward(self, dense: Tensor, sparse: Any) -> Tensor:
        lower = self.bottom(dense)
        rows = self.ebc(sparse).values().view(len(dense), self.parts, -1, self.dim).prod(1)
        rows = torch.cat([lower[:, None], rows], 1)
        dots = torch.bmm(rows, rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([lower, dots], 1)).squeeze(1)


@dataclass
class Method:
    """Tables of a method, and what becomes of ids."""

    tables: list[sl.EmbeddingBagConfig]
    ids: Tensor
    dim: int = DIM
    parts: int = 1
    keep: int = 0  # rows that are left after training; 0: all


def build_method(name: str, sample: Sample, ratio: float, options: argparse.Namespace) -> Method:
    """A method at a share of the dense bytes."""
    total = sum(sample.rows)
    storage: Any = "fp32" if name == "dense" else options.dtype
    room = int(ratio * sample.touched * 4 * DIM / (ROW_BYTES[storage] + index_bytes(name, options)))
    if name in ("pruned", "rows"):
        storage = {"kind": "pruned", "dtype": storage,
                   "budget": {"ratio": ratio * sample.touched / total},
                   "chunks": 1 if name == "rows" else options.chunks, "start": options.start,
                   "warmup": options.warmup, "ramp": options.ramp, "period": options.period,
                   "gamma": options.gamma, **json.loads(options.storage)}
    rows, ids, dim, keep = sample.rows, sample.ids, DIM, 0
    if name == "dimension":
        dim = columns_of(ratio, storage)
    elif name == "hashing":
        rows = [max(1, int(n * room / total)) for n in sample.rows]
        ids = torch.stack([each * 2_654_435_761 % n for each, n in zip(ids, rows, strict=True)])
    elif name == "frequency":
        rows, ids = most_frequent(sample, room, int(options.counted * sample.train))
    elif name == "magnitude":
        keep = room
    elif name == "qr":
        return quotient_remainder(sample, room / total, storage)
    return Method(_tables(rows, dim, storage), ids, dim, keep=keep)


def _tables(rows: list[int], dim: int, storage: Any) -> list[sl.EmbeddingBagConfig]:
    return [sl.EmbeddingBagConfig(num_embeddings=n, embedding_dim=dim, name=f"t{i}",
                                  storage=storage, sharding="table_wise")
            for i, n in enumerate(rows)]


def most_frequent(sample: Sample, room: int, counted: int) -> tuple[list[int], Tensor]:
    """Rows for the ``room`` ids of all features that are most frequent in the first ``counted``
    samples, and one for the rest of each feature."""
    counts = [torch.bincount(each[:counted], minlength=n)
              for each, n in zip(sample.ids, sample.rows, strict=True)]
    every = torch.cat(counts)
    rank = max(0, room - len(counts))
    least = every.sort(descending=True).values[rank] if rank < len(every) else 0
    rows, ids = [], []
    for each, count in zip(sample.ids, counts, strict=True):
        kept = count > least
        number = kept.cumsum(0) * kept
        rows.append(int(kept.sum()) + 1)
        ids.append(number[each])
    return rows, torch.stack(ids)


def index_bytes(name: str, options: argparse.Namespace) -> float:
    """Bytes a row of the index of a method, beside what its storage counts itself."""
    return INDEX_BYTES if options.index and name in ("frequency", "magnitude") else 0.0


def columns_of(ratio: float, dtype: str) -> int:
    """Columns of every row at a share of the dense bytes; 0 or less: not even one."""
    fixed = ROW_BYTES[dtype] - DIM * ELEMENT_BYTES[dtype]
    return int((ratio * 4 * DIM - fixed) // ELEMENT_BYTES[dtype])


def quotient_remainder(sample: Sample, share: float, storage: str) -> Method:
    """Two tables a feature whose rows add up to a share of the ids', or to the fewest possible."""
    first, second, quotients, remainders = [], [], [], []
    for each, n in zip(sample.ids, sample.rows, strict=True):
        room = max(share * n, 2 * n ** 0.5)
        buckets = max(1, int((room + max(0.0, room * room - 4 * n) ** 0.5) / 2))
        first.append(buckets)
        second.append(-(-n // buckets))
        remainders.append(each % buckets)
        quotients.append(each // buckets)
    tables = _tables(first, DIM, storage) + [
        sl.EmbeddingBagConfig(num_embeddings=n, embedding_dim=DIM, name=f"q{i}", storage=storage,
                              weight_init_min=1.0, weight_init_max=1.0, sharding="table_wise")
        for i, n in enumerate(second)]
    return Method(tables, torch.stack(remainders + quotients), parts=2)


def features_of(method: Method, some: slice | Tensor) -> Any:
    names = [table.name for table in method.tables]
    return sl.KeyedJaggedTensor(names, method.ids[:, some].reshape(-1), fixed_length=1)


def run(name: str, sample: Sample, ratio: float, seed: int,
        options: argparse.Namespace) -> dict[str, Any]:
    """Trains one epoch; AUC, logloss, bytes held."""
    torch.manual_seed(seed)
    method = build_method(name, sample, ratio, options)
    model, optimizer = sl.shard(DLRM(method.tables, method.dim, method.parts), seed=seed,
                                optimizer=sl.optim.RowWiseAdagrad(lr=options.lr))
    started = time.perf_counter()
    loss_of = nn.BCEWithLogitsLoss()
    for first in range(0, sample.train, options.batch):
        some = slice(first, min(first + options.batch, sample.train))
        optimizer.zero_grad()
        loss_of(model(sample.dense[some], features_of(method, some)),
                sample.labels[some]).backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    collection = model.collections()["ebc"]
    held = collection.tier_bytes().total
    if method.keep:
        keep_largest(collection, method.keep)
        held = method.keep * ROW_BYTES[options.dtype]
    held += int(index_bytes(name, options) * (method.keep or sum(
        table.num_embeddings for table in method.tables)))
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(sample.dense[part], features_of(method, part))
                            for part in torch.arange(sample.train, len(sample.labels)).split(4096)])
    labels = sample.labels[sample.train:]
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    dense = sample.touched * 4 * DIM
    return {"method": name, "ratio": ratio, "seed": seed, "auc": exact_auc(logits, labels),
            "logloss": float(loss), "bytes_ratio": held / dense, "seconds": seconds}


def keep_largest(collection: Any, room: int) -> None:
    """Zeros in all rows but those of the largest norms."""
    chunks = list(collection.chunks())
    norms = torch.cat([chunk.weights.square().sum(1) for chunk in chunks])
    least = norms.sort(descending=True).values[min(room, len(norms) - 1)]
    collection.begin_load()
    for chunk in chunks:
        chunk.weights[chunk.weights.square().sum(1) <= least] = 0
        collection.load_chunk(chunk)


def main() -> None:
    """Runs all cases; one JSON line each, then a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", help="the sample, a parquet file")
    data.add_argument("--synthetic", type=int, help="rows of the teacher's clicks to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.0625, 0.01])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--period", type=int, default=100)
    parser.add_argument("--gamma", type=float, default=0.996)
    parser.add_argument("--start", default="empty")
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--ramp", type=int, default=100)
    parser.add_argument("--dtype", default="fp32", choices=ROW_BYTES, help="of all but dense rows")
    parser.add_argument("--index", action="store_true",
                        help="frequency and magnitude count an index of their rows")
    parser.add_argument("--counted", type=float, default=1.0,
                        help="share of the training part that frequency counts in advance")
    parser.add_argument("--storage", default="{}", help="more keys of the pruned storage, JSON")
    parser.add_argument("--tune", action="store_true",
                        help="validate on the last ninth of the training part")
    options = parser.parse_args()
    sample = draw_sample(options.synthetic) if options.synthetic else \
        read_sample(options.data, tune=options.tune)
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for ratio, name in [(1.0, "dense"), *((ratio, name) for ratio in options.ratios
                                              for name in options.methods)]:
            if name == "dimension" and columns_of(ratio, options.dtype) < 1:
                continue
            result = run(name, sample, ratio, seed, options)
            print(json.dumps(result), flush=True)
            found.setdefault((ratio, name), []).append(result)
    print("| budget | method | held | AUC | +- | logloss |\n|---|---|---|---|---|---|")
    for (ratio, name), results in sorted(found.items(), key=lambda item: (-item[0][0],
                                                                         item[0][1])):
        auc = [one["auc"] for one in results]
        error = statistics.stdev(auc) / len(auc) ** 0.5 if len(auc) > 1 else 0.0
        print(f"| {ratio:.4g} | {name} | {statistics.mean(o['bytes_ratio'] for o in results):.4f} "
              f"| {statistics.mean(auc):.4f} | {error:.4f} "
              f"| {statistics.mean(o['logloss'] for o in results):.4f} |")


if __name__ == "__main__":
    main()
