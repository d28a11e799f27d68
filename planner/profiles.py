"""Built-in machines, each number with its origin.

Speeds are what programs reach, not what data sheets promise, wherever a measurement is known.
Data-sheet sizes of HBM are replaced by what ``torch.cuda`` reports as total memory.
"""

from __future__ import annotations

from shardlab.planner.topology import Link, Memory, Topology

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
# One more segment in a multi-table kernel. Own assumption.
_GPU_SHARD_OVERHEAD_S = 0.5e-6
# HBM kept for the dense model, activations, NCCL and the allocator. Own assumption; TorchRec
# keeps 15 % for the same.
_GPU_RESERVED = 0.10


def _gpu(name: str, hbm_gib: float, hbm_gb_per_s: float, ddr_tb: float, ssd_tb: float,
         links: tuple[Link, Link]) -> Topology:
    reached = hbm_gb_per_s * _GB * _KERNEL_SHARE
    return Topology(
        name=name, hosts=1, ranks_per_host=1, hbm_bytes=int(hbm_gib * _GIB),
        ddr_bytes=int(ddr_tb * _TB), ssd_bytes=int(ssd_tb * _TB),
        memory=Memory(stream_bytes_per_s=reached, rows_per_s=reached / _ROW_EXTRA_BYTES,
                      row_bytes_per_s=reached, ids_per_s=reached / _SORT_BYTES),
        intra_host=links[0], inter_host=links[1], reserved_fraction=_GPU_RESERVED,
        shard_overhead_s=_GPU_SHARD_OVERHEAD_S)


def _nvlink(gb_per_s: float) -> Link:
    return Link(gb_per_s * _GB * _LINK_SHARE, _NVLINK_LATENCY_S)


# NVLink: A100 data sheet 600 GB/s, both directions together; H100 and H200 900 GB/s.
_NVLINK_3 = _nvlink(300)
_NVLINK_4 = _nvlink(450)
# ZionEX, 200 Gb/s RoCE per GPU: all-to-all reaches about 7 GB/s on 128 GPUs (arXiv 2104.05158).
_ROCE_200 = Link(7 * _GB, _NETWORK_LATENCY_S)
# One HDR (200 Gb/s) or NDR (400 Gb/s) InfiniBand port per GPU.
_HDR = Link(25 * _GB * _LINK_SHARE, _NETWORK_LATENCY_S)
_NDR = Link(50 * _GB * _LINK_SHARE, _NETWORK_LATENCY_S)

PROFILES: dict[str, Topology] = {
    # One rank is one thread of a 2-core AVX-512 server with 24 GiB. Measured: random rows of
    # 64 / 128 / 256 / 512 B at 43 / 32 / 21 / 12 M rows/s, which 14.7 ns + bytes / 7.5 GB/s fits
    # within 4 %; streams at 14.4 GB/s; ids de-duplicated in 8 to 12 ns each; gloo all-to-all
    # between two processes of one host 165 us at 8 B and 1.2 ms at 4 MiB (2 MiB to the peer).
    # Between hosts: 10 Gb/s Ethernet at 90 %, assumed to cost the same per message. Per-shard
    # cost: own assumption.
    "cpu": Topology(
        name="cpu", hosts=1, ranks_per_host=1, hbm_bytes=12 * _GIB, ddr_bytes=24 * _GIB,
        ssd_bytes=0, memory=Memory(14.4 * _GB, 1 / 14.7e-9, 7.5 * _GB, 90e6),
        intra_host=Link(2.0 * _GB, 165e-6), inter_host=Link(1.125 * _GB, 165e-6),
        reserved_fraction=0.10, shard_overhead_s=2e-6),
    # Data sheets of A100-SXM4, H100-SXM5 and H200-SXM (bandwidth); ZionEX (first) and DGX A100,
    # DGX H100 and DGX H200 (host memory and NVMe cache disks).
    "a100-40gb": _gpu("a100-40gb", 39.4, 1555, 1.5, 15, (_NVLINK_3, _ROCE_200)),
    "a100-80gb": _gpu("a100-80gb", 79.1, 2039, 2, 30, (_NVLINK_3, _HDR)),
    "h100": _gpu("h100", 79.1, 3350, 2, 30, (_NVLINK_4, _NDR)),
    "h200": _gpu("h200", 139.8, 4800, 2, 30, (_NVLINK_4, _NDR)),
}
