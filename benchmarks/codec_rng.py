"""Random bits for rounding to fp16: cost an element and quality, of three generators.

    python codec_rng.py                  # needs g++ and a processor with AVX-512

* philox: Philox4x32-10 with a word of its own for every element, as frameworks do;
* byte reuse: xoshiro128++ in every lane, each word used for four elements, a byte each, as in
  FBGEMM's CPU kernels (`RowWiseSparseAdagradFused.cc`);
* ours: `csrc/random.h`, one 64-bit mix a row and two 32-bit multiplications an element.

Cost: rows of 64 floats that stay in the first-level cache, so that generator and rounding are all
there is; the median over turns that take each in another order, and the share of nearest rounding
is printed to be taken off. Quality: the mean error of rounding in units of the last place (ulp)
with its distance from zero in standard errors, for values between two fp16 numbers at several
fractions, normal and subnormal; and the largest correlation between the rounding of neighbouring
columns, rows and keys, in standard errors. Prints JSON lines.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
METHODS = ("philox", "byte_reuse", "ours", "nearest")
_COLUMNS, _ROWS, _TURNS = 64, 20_000, 31
#: (value, fp16 step there, share of the step that is to be kept on average).
_CASES = [(base, step, share) for base, step in ((1.0, 2.0**-10), (-0.01, -(2.0**-17)),
                                                 (2.0**-18, 2.0**-24))
          for share in (0.5, 0.1, 1 / 300)]


def library() -> ctypes.CDLL:
    """The compiled kernels."""
    source = HERE / "codec_rng.cpp"
    tag = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / f"codec_rng_{tag}.so"
    if not target.exists():
        flags = ("-O3 -std=c++20 -shared -fPIC -ffp-contract=off -fno-math-errno -Wno-psabi "
                 "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mbmi2 "
                 "-mprefer-vector-width=512")
        subprocess.run(["g++", *flags.split(), f"-I{HERE.parent / 'csrc'}", str(source), "-o",
                        str(target)], check=True)
    return ctypes.CDLL(str(target))


class Encoder:
    """One method."""

    def __init__(self, kernels: ctypes.CDLL, name: str) -> None:
        self.kernel = getattr(kernels, f"encode_{name}")
        pointer, word, count = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64
        self.kernel.argtypes = [pointer, pointer, count, word, word, word, count]

    def rows(self, value: float, key: int) -> np.ndarray:
        """A value, rounded in every cell of a matrix: fp64 [rows, columns]."""
        values = np.full(_COLUMNS, value, np.float32)
        codes = np.empty((_ROWS, _COLUMNS), np.uint16)
        self.kernel(values.ctypes.data, codes.ctypes.data, _COLUMNS, key, 0, _ROWS, _COLUMNS)
        return codes.view(np.float16).astype(np.float64)

    def seconds(self) -> float:
        """CPU time of one element."""
        values = np.random.default_rng(0).uniform(-0.01, 0.01, _COLUMNS).astype(np.float32)
        codes = np.empty(_COLUMNS, np.uint16)
        began = time.process_time()
        self.kernel(values.ctypes.data, codes.ctypes.data, _COLUMNS, 7, 0, _ROWS, 0)
        return (time.process_time() - began) / (_ROWS * _COLUMNS)


def cost(encoders: dict[str, Encoder]) -> dict[str, float]:
    """ns an element."""
    found: dict[str, list[float]] = {name: [] for name in encoders}
    order = list(encoders)
    for _ in range(_TURNS):
        random.shuffle(order)
        for name in order:
            found[name].append(encoders[name].seconds())
    return {name: statistics.median(seconds) * 1e9 for name, seconds in found.items()}


def bias(encoder: Encoder) -> list[dict[str, float]]:
    """Mean errors by case."""
    found = []
    for value, step, share in _CASES:
        wanted = float(np.float32(value)) if value != -0.01 else float(np.float16(value))
        target = np.float32(wanted + share * step)
        errors = (encoder.rows(float(target), 3) - float(target)) / abs(step)
        noise = max(errors.std() / errors.size**0.5, 1e-12)
        found.append({"value": wanted, "share_of_ulp": round(share, 5),
                      "mean_error_ulp": round(float(errors.mean()), 6),
                      "standard_errors": round(float(errors.mean() / noise), 1)})
    return found


def correlation(encoder: Encoder) -> float:
    """Largest of columns, rows and keys, in standard errors."""
    up = encoder.rows(1.0 + 0.5 * 2.0**-10, 11) > 1.0
    other = encoder.rows(1.0 + 0.5 * 2.0**-10, 12) > 1.0
    pairs = [(up[:, :-lag], up[:, lag:]) for lag in (1, 2, 4, 16, 32)]
    pairs += [(up[:-lag], up[lag:]) for lag in (1, 2, 64)] + [(up, other)]
    return max(abs(float(np.mean((a * 2.0 - 1) * (b * 2.0 - 1)))) * a.size**0.5 for a, b in pairs)


def main() -> None:
    """Prints a line per method."""
    kernels = library()
    encoders = {name: Encoder(kernels, name) for name in METHODS}
    costs = cost(encoders)
    for name, encoder in encoders.items():
        line = {"method": name, "ns_per_element": round(costs[name], 4)}
        if name != "nearest":
            line |= {"ns_over_nearest": round(costs[name] - costs["nearest"], 4),
                     "correlation_standard_errors": round(correlation(encoder), 1),
                     "bias": bias(encoder)}
        print(json.dumps(line))


if __name__ == "__main__":
    main()
