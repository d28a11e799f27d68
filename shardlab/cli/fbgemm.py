"""Does the installed fbgemm-gpu fit the installed torch? Asked in a process of its own.

A wheel that was built against another torch fails at import, at best with an undefined symbol, at
worst with a crash; so the import happens where it can take nothing with it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from shardlab.cli.findings import Finding

#: torch release -> the fbgemm-gpu release that was built for it.
MATCHING: dict[str, str] = {
    "2.9": "1.4", "2.10": "1.5", "2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9",
}
_PACKAGES = ("fbgemm-gpu-cpu", "fbgemm-gpu", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu")
_TIMEOUT_S = 180
_PROBE = """
import torch, fbgemm_gpu
lengths = torch.tensor([1, 2], dtype=torch.int64)
assert torch.ops.fbgemm.asynchronous_complete_cumsum(lengths).tolist() == [0, 1, 3]
"""


def check_fbgemm(torch_version: str, cuda: str | None) -> Finding:
    """Checks the optional fbgemm-gpu.

    Args:
        torch_version: such as "2.13.0+cpu".
        cuda: the CUDA release torch was built for, None for a CPU build.

    Returns:
        A finding that names the matching version and the command that installs it. It is never
        "broken": ShardLab works without fbgemm-gpu.
    """
    installed = {name: found for name in _PACKAGES if (found := _installed(name)) is not None}
    minor = ".".join(torch_version.split(".")[:2])
    wanted = MATCHING.get(minor)
    if wanted is None:
        known = ", ".join(MATCHING)
        command = f"no fbgemm-gpu is known for torch {minor}; one is known for {known}"
    else:
        command = _command(wanted, cuda, list(installed))
    if not installed:
        return Finding("fbgemm-gpu", "ok", "not installed; optional", command)
    named = ", ".join(f"{name} {found}" for name, found in installed.items())
    problem = _import_problem()
    if problem is not None:
        return Finding("fbgemm-gpu", "note", f"{named} cannot be used: {problem}", command)
    fits = wanted is None or all(_minor(found) == wanted for found in installed.values())
    if not fits or len(installed) > 1:
        reason = f"torch {minor} goes with {wanted}" if not fits else "keep one of them"
        return Finding("fbgemm-gpu", "note", f"{named} can be imported, but {reason}", command)
    return Finding("fbgemm-gpu", "ok", f"{named} fits torch {torch_version}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _minor(text: str) -> str:
    return ".".join(text.split(".")[:2])


def _command(wanted: str, cuda: str | None, installed: list[str]) -> str:
    remove = f"pip uninstall -y {' '.join(installed)} && " if installed else ""
    if cuda is None:
        return f'{remove}pip install "fbgemm-gpu-cpu=={wanted}.*"'
    build = f"cu{cuda.replace('.', '')}"
    return f'{remove}pip install "fbgemm-gpu=={wanted}.*" (the {build} build, as torch is)'


def _import_problem() -> str | None:
    """Why `import fbgemm_gpu` fails in a fresh process, or None where it works."""
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True,
                               timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"its import did not end within {_TIMEOUT_S} s"
    return explain_failure(probe.returncode, probe.stderr)


def explain_failure(code: int, stderr: str) -> str | None:
    """A failed import in words.

    Args:
        code: exit code of the process that imported.
        stderr: what it wrote.

    Returns:
        The reason, or None for exit code 0.
    """
    if code == 0:
        return None
    if code < 0:
        return f"its import crashes with signal {-code}: it was built for another torch"
    symbol = re.search(r"undefined symbol: (\S+)", stderr)
    if symbol:
        return f"undefined symbol {symbol[1]}: it was built for another torch"
    library = re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object", stderr)
    if library:
        name = library[1]
        if "nvidia" in name or "cuda" in name or name.startswith(("libcu", "libnv")):
            return f"{name} is missing: this is the CUDA build, the machine has no CUDA driver"
        return f"{name} is missing"
    lines = [line for line in stderr.strip().split("\n") if line.strip()]
    return lines[-1].strip() if lines else f"its import ends with exit code {code}"
