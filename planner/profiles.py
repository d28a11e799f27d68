"""Built-in machines, each number with its origin.

Speeds are what programs reach, not what data sheets promise, wherever a measurement is known.
Data-sheet sizes of HBM are replaced by what ``torch.cuda`` reports as total memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from shardlab.errors import ConfigError, nearest_name
from shardlab.planner.topology import Disk, Link, Memory, Topology

_GB = 10**9
_GIB = 2**30
_TB = 10**12

# Share of the data sheet's bandwidth that fused embedding kernels reach: 1,300 of 1,555 GB/s on
# the A100-40GB (Mudigere et al., arXiv 2104.05158).
_KERNEL_SHARE = 1300 / 1555
# A random row costs as much as this many bytes more than it has: half-used 32-byte sectors at
# both ends and the opened DRAM page. Own assumption.
_ROW_EXTRA_BYTES = 64
# Memory traffic of sorting one 8-byte id with its position and finding where it first stood: eight
# radix passes and a few scatters. Own assumption.
_SORT_BYTES = 1024
# Share of a GPU link's data-sheet bandwidth that NCCL's all-to-all reaches: about 230 of 300 GB/s
# within a DGX A100 (nccl-tests, bus bandwidth). The same share is assumed for the other links.
_LINK_SHARE = 230 / 300
# Per-message cost of NCCL's grouped send/receive within and between hosts. Own assumption, of the
# order of the small-message all-to-all times of nccl-tests.
_NVLINK_LATENCY_S = 2e-6
_NETWORK_LATENCY_S = 4e-6
# Message to a peer at which a GPU's link reaches half of its speed; and the message at which it
# reaches all of it. Own assumption, after the rise of nccl-tests' bus bandwidth with size.
_HALF_SPEED_BYTES, _FULL_SPEED_BYTES = 64 << 10, 2 << 20
# A copy between device and host that is queued on a stream. Own assumption.
_COPY_LATENCY_S = 10e-6
# One more segment in a multi-table kernel. Own assumption.
_GPU_SHARD_OVERHEAD_S = 0.5e-6
# Python and kernel launches of a step: about 100 launches of 10 us. Own assumption.
_GPU_STEP_OVERHEAD_S = 1e-3
# Share of the data sheet's dense products that a DLRM's layers reach. Own assumption.
_PRODUCT_SHARE = 0.6
# Encoding and decoding read fp32 and write at most as much, or the reverse, in one pass.
_CODEC_SHARE = 0.5
# Memory kept for the dense model, activations, NCCL and the allocator. Own assumption; TorchRec
# keeps 15 % for the same.
_GPU_RESERVED = 0.10
# Data-sheet bandwidth of host memory that many cores reach together. Own assumption.
_DDR_SHARE = 0.8
_GPUS_PER_HOST = 8


@dataclass(frozen=True)
class _Gpu:
    """Data-sheet numbers of a GPU and its share of a host of `_GPUS_PER_HOST`."""

    name: str
    hbm_gib: float
    hbm_gb_per_s: float
    ddr_tb: float
    ddr_gb_per_s: float  # of the host
    pcie_gb_per_s: float  # of a GPU, one direction, while all of them copy
    disks: int  # of the host
    nvlink_gb_per_s: float  # one direction
    network: Link
    fp32_tflops: float
    bf16_tflops: float


def _memory(bytes_per_s: float) -> Memory:
    return Memory(stream_bytes_per_s=bytes_per_s, rows_per_s=bytes_per_s / _ROW_EXTRA_BYTES,
                  row_bytes_per_s=bytes_per_s, ids_per_s=bytes_per_s / _SORT_BYTES)


def _flat(bytes_per_s: float, latency_s: float) -> Link:
    return Link(((1.0, bytes_per_s),), latency_s)


def _rising(bytes_per_s: float, latency_s: float) -> Link:
    return Link(((_HALF_SPEED_BYTES, bytes_per_s / 2), (_FULL_SPEED_BYTES, bytes_per_s)),
                latency_s)


def _disks(count: int) -> Disk:
    """U.2 drives of 3.84 TB as DGX hosts have them, by the data sheet of Samsung's PM1733: reads
    7.0 GB/s and 1,500,000 IOPS, writes 3.8 GB/s and 135,000 IOPS, one drive write a day for
    five years."""
    capacity = 3.84 * _TB
    return Disk(capacity_bytes=int(count * capacity), read_iops=count * 1.5e6,
                write_iops=count * 135e3, read_bytes_per_s=count * 7.0 * _GB,
                write_bytes_per_s=count * 3.8 * _GB, endurance_bytes=count * capacity * 365 * 5)


def _topology(gpu: _Gpu) -> Topology:
    reached = gpu.hbm_gb_per_s * _GB * _KERNEL_SHARE
    return Topology(
        name=gpu.name, hosts=1, ranks_per_host=1, hbm_bytes=int(gpu.hbm_gib * _GIB),
        ddr_bytes=int(gpu.ddr_tb * _TB), hbm=_memory(reached),
        ddr=_memory(gpu.ddr_gb_per_s * _GB * _DDR_SHARE / _GPUS_PER_HOST),
        ssd=_disks(gpu.disks),
        device_host=_rising(gpu.pcie_gb_per_s * _GB, _COPY_LATENCY_S),
        intra_host=_rising(gpu.nvlink_gb_per_s * _GB * _LINK_SHARE, _NVLINK_LATENCY_S),
        inter_host=gpu.network, encode_bytes_per_s=reached * _CODEC_SHARE,
        decode_bytes_per_s=reached * _CODEC_SHARE,
        fp32_flops_per_s=gpu.fp32_tflops * 1e12 * _PRODUCT_SHARE,
        bf16_flops_per_s=gpu.bf16_tflops * 1e12 * _PRODUCT_SHARE,
        reserved_fraction=_GPU_RESERVED, shard_overhead_s=_GPU_SHARD_OVERHEAD_S,
        step_overhead_s=_GPU_STEP_OVERHEAD_S)


# NVLink, one direction: A100 data sheet 600 GB/s both directions together; H100 and H200 900 GB/s.
_NVLINK_3, _NVLINK_4 = 300, 450
# ZionEX, 200 Gb/s RoCE per GPU: all-to-all reaches about 7 GB/s on 128 GPUs at 256 MB, which is
# 2 MB to each (arXiv 2104.05158).
_ROCE_200 = _rising(7 * _GB, _NETWORK_LATENCY_S)
# One HDR (200 Gb/s) or NDR (400 Gb/s) InfiniBand port per GPU.
_HDR = _rising(25 * _GB * _LINK_SHARE, _NETWORK_LATENCY_S)
_NDR = _rising(50 * _GB * _LINK_SHARE, _NETWORK_LATENCY_S)
# Host memory: ZionEX 320 GB/s (arXiv 2104.05158); DGX A100 two sockets of eight channels
# DDR4-3200, DGX H100 and H200 of DDR5-4800.
_ZIONEX_DDR, _DGX_A100_DDR, _DGX_H100_DDR = 320, 2 * 8 * 25.6, 2 * 8 * 38.4
# PCIe x16 of generation 4 and 5, one direction: 80 % of 31.5 and 63 GB/s. Own assumption.
_PCIE_4, _PCIE_5 = 25, 50

# Data sheets of A100-SXM4, H100-SXM5 and H200-SXM (bandwidth, fp32 and dense bf16 products); disks
# and host memory of DGX A100, DGX H100 and DGX H200, of ZionEX for the A100-40GB.
_GPUS = (
    _Gpu("a100-40gb", 39.4, 1555, 1.5, _ZIONEX_DDR, _PCIE_4, 4, _NVLINK_3, _ROCE_200, 19.5, 312),
    _Gpu("a100-80gb", 79.1, 2039, 2, _DGX_A100_DDR, _PCIE_4, 8, _NVLINK_3, _HDR, 19.5, 312),
    _Gpu("h100", 79.1, 3350, 2, _DGX_H100_DDR, _PCIE_5, 8, _NVLINK_4, _NDR, 67, 989),
    _Gpu("h200", 139.8, 4800, 2, _DGX_H100_DDR, _PCIE_5, 8, _NVLINK_4, _NDR, 67, 989),
)

# One rank is one thread of a 2-core AVX-512 server with 24 GiB. Measured: random rows of
# 64 / 128 / 256 / 512 B at 43 / 32 / 21 / 12 M rows/s, which 14.7 ns + bytes / 7.5 GB/s fits
# within 4 %; streams at 14.4 GB/s; ids de-duplicated in 8 to 12 ns each.
_CPU_MEMORY = Memory(14.4 * _GB, 1 / 14.7e-9, 7.5 * _GB, 90e6)
_CPU = Topology(
    name="cpu", hosts=1, ranks_per_host=1, hbm_bytes=12 * _GIB, ddr_bytes=8 * _GIB,
    hbm=_CPU_MEMORY, ddr=_CPU_MEMORY,
    # Measured with O_DIRECT: 4 KiB reads 57,000/s, runs read at 1.5 and written at 2.2 GB/s.
    # Random writes: as many as reads, own assumption.
    ssd=Disk(100 * _GB, 57e3, 57e3, 1.5 * _GB, 2.2 * _GB),
    device_host=None,
    # gloo all-to-all between two processes of one host: 165 us at 8 B, 1.2 ms at 2 MiB to the
    # peer. Between hosts: 10 Gb/s Ethernet at 90 %, assumed to cost the same per message.
    intra_host=_flat(2.0 * _GB, 165e-6), inter_host=_flat(1.125 * _GB, 165e-6),
    # A pass over memory that is not wider than the kernels' lanes; own assumption.
    encode_bytes_per_s=7 * _GB, decode_bytes_per_s=7 * _GB,
    # Measured: square products of 1,024 and more, one thread, AVX-512 and AMX.
    fp32_flops_per_s=162e9, bf16_flops_per_s=1150e9,
    # Own assumptions; the shard's is about what one more job of a kernel costs.
    reserved_fraction=0.10, shard_overhead_s=2e-6, step_overhead_s=0.5e-3,
    # Measured: a layer of 64 x 64 on 64 samples.
    layer_overhead_s=80e-6)

PROFILES: dict[str, Topology] = {"cpu": _CPU, **{gpu.name: _topology(gpu) for gpu in _GPUS}}


def nearest_profile(device: str, memory: int) -> Topology:
    """The profile of a GPU, or of the most similar one that there is.

    Args:
        device: its name, such as "NVIDIA H100 80GB HBM3".
        memory: its bytes of memory.
    """
    gpus = [profile for name, profile in PROFILES.items() if name != "cpu"]
    kin = [profile for profile in gpus if profile.name.split("-")[0] in device.lower()]
    return min(kin or gpus, key=lambda profile: abs(profile.hbm_bytes - memory))


_NAME = re.compile(r"(?:(?:(?P<hosts>\d+)x)?(?P<ranks>\d+)x)?(?P<profile>[a-z][a-z0-9-]*)")


def read_profile(name: str) -> Topology:
    """A built-in profile in a size: ``cpu``, ``8xh100``, ``16x8xh100``.

    Raises:
        ConfigError: no such profile; lists the known ones.
    """
    match = _NAME.fullmatch(name)
    base = PROFILES.get(match["profile"]) if match else None
    if match is None or base is None:
        size = name[:match.start("profile")] if match else ""
        known = [size + profile for profile in PROFILES]
        raise ConfigError(f"unknown topology {name!r}{nearest_name(name, known)}; known "
                          f"profiles: {', '.join(PROFILES)}, each with sizes like 8xh100 (one "
                          "host) or 16x8xh100 (16 hosts); or the path of a YAML file")
    return replace(base, name=name, hosts=int(match["hosts"] or 1),
                   ranks_per_host=int(match["ranks"] or 1))
