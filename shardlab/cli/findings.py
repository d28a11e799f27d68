"""What `shardlab doctor` finds out about this machine and installation, without judging by crash.

Every check returns findings; a finding that is not fine says what to do.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "note", "broken"]

OLDEST_TORCH = (2, 9)
_GIB = 1 << 30
_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SHARED_MEMORY = Path("/dev/shm")
#: CPU features that the kernels and torch's bf16 layers have a use for.
_CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        state: "ok"; "note": works, but could be better; "broken": something needed is not there.
        text: what was found.
        advice: what to do, where something should be done.
    """

    subject: str
    state: State
    text: str
    advice: str = ""


def machine() -> list[Finding]:
    """Cores, instruction sets, memory, huge pages, shared memory."""
    from shardlab.launch.environment import available_cores

    return [
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Finding("cores", "ok", f"{available_cores()} usable of {os.cpu_count()}"),
        _cpu_features(), _memory(), _huge_pages(), _shared_memory(),
    ]


def _cpu_features() -> Finding:
    if not _CPUINFO.exists():
        return Finding("cpu", "ok", platform.machine())
    text = _CPUINFO.read_text()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    here = set(flags[1].split()) if flags else set()
    found = [feature for feature in _CPU_FEATURES if feature in here]
    return Finding("cpu", "ok", f"{name[1] if name else platform.machine()}; "
                                f"{', '.join(found) or 'no vector extensions known here'}")


def _memory() -> Finding:
    if not _MEMINFO.exists():
        return Finding("memory", "ok", "size not known on this system")
    sizes = {name: int(kib) * 1024 for name, kib in
             re.findall(r"^(\w+):\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)}
    return Finding("memory", "ok", f"{sizes['MemAvailable'] / _GIB:.1f} GiB available of "
                                   f"{sizes['MemTotal'] / _GIB:.1f} GiB")


def _huge_pages() -> Finding:
    chosen = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text()) if _HUGE_PAGES.exists() else None
    if chosen is None:
        return Finding("transparent huge pages", "ok", "not offered by this system")
    if chosen[1] == "never":
        return Finding("transparent huge pages", "note", "never: random rows miss the TLB more",
                       f"as root: echo madvise > {_HUGE_PAGES}")
    return Finding("transparent huge pages", "ok", chosen[1])


def _shared_memory() -> Finding:
    if not _SHARED_MEMORY.exists():
        return Finding("shared memory", "ok", "no /dev/shm on this system")
    size = shutil.disk_usage(_SHARED_MEMORY).total
    if size < _GIB:  # containers default to 64 MiB
        return Finding("shared memory", "note", f"/dev/shm holds {size / (1 << 20):.0f} MiB",
                       "NCCL and data loaders may need more: docker run --shm-size=8g")
    return Finding("shared memory", "ok", f"/dev/shm holds {size / _GIB:.1f} GiB")


def torch_and_devices() -> list[Finding]:
    """torch, CUDA, NCCL and gloo. A torch that cannot be imported is broken, not a crash."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("torch", "broken", f"cannot be imported: {error}",
                        "pip install --force-reinstall torch")]
    oldest = ".".join(map(str, OLDEST_TORCH))
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    version = Finding("torch", "ok", torch.__version__) if found >= OLDEST_TORCH else Finding(
        "torch", "broken", f"{torch.__version__}, older than {oldest}",
        f'pip install "torch>={oldest}"')
    return [version, *(_cuda_findings() if torch.cuda.is_available() else [
        Finding("cuda", "ok", "no device: ranks train on the CPU over gloo")]), _gloo()]


def _cuda_findings() -> list[Finding]:
    """The devices, and NCCL, which ranks on CUDA need."""
    import torch
    import torch.distributed as dist

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = Finding("cuda", "ok", f"{torch.version.cuda}; {', '.join(names)}")
    if not (dist.is_available() and dist.is_nccl_available()):
        return [devices, Finding("nccl", "broken", "torch was built without it, but CUDA is there",
                                 "install an official torch wheel for CUDA")]
    found: Any = torch.cuda.nccl
    return [devices, Finding("nccl", "ok", ".".join(map(str, found.version())))]


def _gloo() -> Finding:
    import torch.distributed as dist

    if dist.is_available() and dist.is_gloo_available():
        return Finding("gloo", "ok", "available")
    return Finding("gloo", "broken", "torch was built without it",
                   "install an official torch wheel")


def transport() -> Finding:
    """What CPU ranks of this host exchange over, tried on this process."""
    from shardlab.comm.shared_memory import Meeting, missing_support

    reason = missing_support()
    if not reason:
        try:
            Meeting(rank=0, ranks=2, count=1, timeout_s=1.0).close()
        except OSError as error:
            reason = str(error)
    if reason:
        return Finding("transport of CPU ranks", "note", f"gloo: {reason}",
                       "shared memory would be several times as fast on one host")
    return Finding("transport of CPU ranks", "ok",
                   "shared memory where all ranks share a host, else gloo")


def native_library() -> Finding:
    """The compiled kernels and the instruction set they chose."""
    try:
        from shardlab.ops.registry import native

        module = native()
    except (ImportError, OSError) as error:
        return Finding("native library", "broken", f"cannot be loaded: {error}",
                       "build it again: pip install --force-reinstall --no-deps shardlab")
    if module is None:
        return Finding("native library", "note", "not built: the slow reference faces run",
                       "install from a wheel, or build with a C++20 compiler")
    return Finding("native library", "ok",
                   f"uses {module.isa()}, of {', '.join(module.isas())} on this CPU")
