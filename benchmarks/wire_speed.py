"""Encoding and decoding rows for the wire: our kernels beside fbgemm-gpu's ops, in one run.

    python benchmarks/wire_speed.py [--dims 16 64 128] [--rows 2048 500000] [--threads 1]

fbgemm's are those that TorchRec's quantised communication calls: fp16 is its clamp and half(),
bf16 FloatToBfloat16Quantized, int8 FloatToFused8BitRowwiseQuantized with a scale and a bias of
4 bytes each a row, int4 FloatToFusedNBitRowwiseQuantizedSBHalf. Equality (fp16) and error bounds
(the others; fbgemm rounds ties of bf16 up, we to even) are asserted first. Turns run all of them
in another order each time; what is told is CPU time of the process, median of turns. Prints a JSON
line per case: GB/s of all bytes read and written, ours over theirs in time (below 1: ours is
faster), and, for scale, a copy of the fp32 rows.

Then the two passes as a step makes them, where ours is one pass and theirs two: rows of a table are
read and encoded (``read``), and rows that came are decoded and pooled (``pool``); the pass besides
fbgemm's op is ours in both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch

from shardlab.codecs import CODECS
from shardlab.comm.wire import CellKind, WireCodec
from shardlab.ops.allocator import keep_freed_memory
from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.moves import move_rows
from shardlab.ops.records import MoveEnd
from shardlab.ops.rounding import Rounding
from shardlab.ops.rows import gather_rows, pool_blocks, pool_rows
from shardlab.storage_bytes import payload_bytes

OPS = torch.ops.fbgemm
_FP16_MOST = 65504.0
#: Largest error of a row's element, of the largest magnitude in it: a byte of scale is up to 1/8
#: too wide (ours), min and max share 255 and 15 steps, both of fp16 in int4 (theirs).
_BOUNDS = {("bf16", "shardlab"): 2.0**-8, ("bf16", "fbgemm"): 2.0**-8,
           ("int8", "shardlab"): 0.5 * 1.125 / 127, ("int8", "fbgemm"): 1.01 / 255,
           ("int4", "shardlab"): 0.5 * 1.125 / 7, ("int4", "fbgemm"): 1.01 / 15 + 2e-3}
Call = Callable[[], torch.Tensor]


def theirs_encode(codec: str, rows: torch.Tensor) -> torch.Tensor:
    if codec == "fp16":
        return rows.clamp(-_FP16_MOST, _FP16_MOST).half()
    if codec == "bf16":
        return OPS.FloatToBfloat16Quantized(rows)
    if codec == "int8":
        return OPS.FloatToFused8BitRowwiseQuantized(rows)
    return OPS.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 4)


def theirs(codec: str, rows: torch.Tensor) -> tuple[Call, Call]:
    """(encode, decode) of fbgemm."""
    coded = theirs_encode(codec, rows)
    decode = {
        "fp16": lambda: coded.float(),
        "bf16": lambda: OPS.Bfloat16QuantizedToFloat(coded),
        "int8": lambda: OPS.Fused8BitRowwiseQuantizedToFloat(coded),
        "int4": lambda: OPS.FusedNBitRowwiseQuantizedSBHalfToFloat(coded, 4)}[codec]
    return lambda: theirs_encode(codec, rows), decode


def ours(codec: str, rows: torch.Tensor, stochastic: bool) -> tuple[Call, Call]:
    """(encode, decode) of ShardLab, into memory of their own each time, as theirs."""
    size, rounding = payload_bytes(codec, rows.shape[1]), Rounding(stochastic, key=7)

    def encode() -> torch.Tensor:
        out = torch.empty(rows.shape[0], size, dtype=torch.uint8)
        encode_rows(rows, codec, out, rounding)
        return out

    coded = encode()

    def decode() -> torch.Tensor:
        out = torch.empty_like(rows)
        decode_rows(coded, codec, out)
        return out

    return encode, decode


def check(codec: str, rows: torch.Tensor) -> None:
    """Both decode to what they promise."""
    mine, other = ours(codec, rows, False)[1](), theirs(codec, rows)[1]()
    if codec == "fp16":
        assert torch.equal(mine, other), "fp16: faces differ"
        return
    largest = rows.abs().amax(1, keepdim=True)
    for name, found in (("shardlab", mine), ("fbgemm", other)):
        error = float(((found - rows).abs() / largest).max())
        assert error <= _BOUNDS[codec, name], f"{codec}, {name}: error {error}"


# ---------------------------------------------------------------- as a step does it
TABLE_ROWS, STEP_ROWS, BAGS_PER_ROW = 200_000, 20_000, 3


def read_calls(codec: str, table: torch.Tensor, ids: torch.Tensor) -> dict[str, Call]:
    """Rows of a table, encoded one behind the other."""
    dim, count = table.shape[1], ids.numel()
    source = Blocks.build(torch.tensor([[0, 4 * dim, 0, 0, dim, table.shape[0]]]), [Encoding()])
    wire, zero = WireCodec([CellKind(codec, dim)]), torch.zeros(1, dtype=torch.int64)
    rows = torch.empty(count, dim)

    def one() -> torch.Tensor:
        out = torch.empty(count * payload_bytes(codec, dim), dtype=torch.uint8)
        end = wire.coded_end(out, zero, torch.tensor([count]), torch.arange(count))
        move_rows(MoveEnd(table.view(torch.uint8).view(-1), source, ids), end,
                  torch.tensor([[0, 0, 0, count]]))
        return out

    def two() -> torch.Tensor:
        gather_rows(table.view(-1), source, torch.tensor([[0, 0, count, 0]]), ids, rows.view(-1))
        return theirs_encode(codec, rows)

    return {"shardlab": one, "fbgemm": two}


def pool_calls(codec: str, rows: torch.Tensor) -> dict[str, Call]:
    """Bags of one id each, out of rows that came encoded."""
    count, dim = rows.shape
    index = torch.randint(count, (BAGS_PER_ROW * count,))
    mine, size = ours(codec, rows, False)[0](), payload_bytes(codec, dim)
    decode, out = theirs(codec, rows)[1], torch.empty(index.numel(), dim)
    job = torch.tensor([[0, 1, dim, index.numel(), 0, 0, 1, 0, 0, dim, 0]])
    coded_job = torch.cat([job, torch.tensor([[CODECS[codec]]])], 1)

    def one() -> torch.Tensor:
        pool_blocks(mine.view(-1), coded_job, index * size, None, None, out.view(-1))
        return out

    def two() -> torch.Tensor:
        pool_rows(decode().view(-1), job, index * dim, None, None, out.view(-1))
        return out

    return {"shardlab": one, "fbgemm": two}


def run_steps(codec: str, count: int, dim: int, turns: int) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(TABLE_ROWS, dim, generator=generator)
    ids = torch.randperm(TABLE_ROWS, generator=generator)[:count].sort().values
    found = []
    for way, calls in (("read", read_calls(codec, table, ids)),
                       ("pool", pool_calls(codec, table[ids]))):
        if codec == "fp16":
            mine, other = (calls[name]().clone().view(torch.uint8).view(-1) for name in calls)
            assert torch.equal(mine, other), f"fp16 {way}: faces differ"
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns + 1):
            for name in random.Random(turn).sample(list(calls), len(calls)):
                start = time.process_time()
                for _ in range(10):
                    calls[name]()
                if turn:
                    seconds[name].append((time.process_time() - start) / 10)
        ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
        found.append({"way": way, "codec": codec, "rows": count, "dim": dim,
                      **{f"{name}_us": round(statistics.median(times) * 1e6)
                         for name, times in seconds.items()}, "ours_to_theirs": round(ratio, 2)})
    return found


def run(codec: str, count: int, dim: int, turns: int) -> list[dict]:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(1))
    check(codec, rows)
    repeats = max(1, (1 << 22) // rows.numel())
    mine, stochastic, other = ours(codec, rows, False), ours(codec, rows, True), theirs(codec, rows)
    calls = {("encode", "shardlab"): mine[0], ("encode", "stochastic"): stochastic[0],
             ("encode", "fbgemm"): other[0], ("decode", "shardlab"): mine[1],
             ("decode", "fbgemm"): other[1], ("copy", "torch"): rows.clone}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(turns + 1):
        for key in random.Random(turn).sample(list(calls), len(calls)):
            start = time.process_time()
            for _ in range(repeats):
                calls[key]()
            if turn:  # the first one warms up
                seconds[key].append((time.process_time() - start) / repeats)
    found = []
    for way in ("encode", "decode"):
        names = [name for kind, name in calls if kind == way]
        median = {name: statistics.median(seconds[way, name]) for name in names}
        moved = {name: rows.nbytes + count * (other[0]().nbytes // count if name == "fbgemm"
                                              else payload_bytes(codec, dim)) for name in names}
        ratio = statistics.median(a / b for a, b in zip(
            seconds[way, "shardlab"], seconds[way, "fbgemm"], strict=True))
        found.append({"way": way, "codec": codec, "rows": count, "dim": dim,
                      **{f"{name}_gb_per_s": round(moved[name] / median[name] / 1e9, 2)
                         for name in names},
                      "copy_gb_per_s": round(2 * rows.nbytes / statistics.median(
                          seconds["copy", "torch"]) / 1e9, 2),
                      "ours_to_theirs": round(ratio, 2)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 500_000])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for codec in ("fp16", "bf16", "int8", "int4"):
        for dim in options.dims:
            for count in options.rows:
                for line in run(codec, count, dim, options.turns):
                    print(json.dumps(line), flush=True)
            for line in run_steps(codec, STEP_ROWS, dim, options.turns):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
