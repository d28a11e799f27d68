"""Milliseconds of the elementary acts of a step on one rank of a topology."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shardlab.planner.settings import DenseModel
from shardlab.planner.topology import Link, Memory, Topology
from shardlab.storage_specs import Tier
from shardlab.wire_bytes import dense_element_bytes

Floats = NDArray[np.float64]

_MS = 1e3
_FP32_BYTES = 4
# Sums travel there and back: a ring all-reduce moves every byte twice.
_REDUCE_PASSES = 2
# Of a layer's three products two belong to the backward pass.
_BACKWARD_SHARE = 2 / 3
# Gradients are copied where they are reduced, and made means afterwards: two reads, two writes.
_REDUCE_COPIES = 4
_ACTIVATION_BYTES = {"fp32": 4, "bf16": 2}


class Speeds:
    """Times of one rank while all ranks work.

    Args:
        topology: the ranks that share the tables.
        machine: all ranks, where several groups hold the tables; None: the same.

    Attributes:
        world: number of ranks.
        memory: speed of hbm and ddr.
        stream: ms of a contiguous byte in hbm.
        sort: ms to de-duplicate an id.
        encode: ms to encode a byte of fp32.
        decode: ms to make a byte of fp32.
        flop: ms of an fp32 operation.
        shard: ms of a shard's bookkeeping.
        overhead: ms of a step's bookkeeping.
        link_byte: ms of a byte between host and device; 0 where ranks compute on the host.
        behind_link: ddr lies behind a link.
        page_read: ms of a random page read of the host's disk, this rank's share of it.
        page_write: ms of a random page write.
        page_byte: ms of a byte of long requests, (read, write).
    """

    def __init__(self, topology: Topology, machine: Topology | None = None) -> None:
        self.topology, self._machine = topology, machine or topology
        self.world = topology.world_size
        self.memory: dict[Tier, Memory] = {Tier.HBM: topology.hbm, Tier.DDR: topology.ddr}
        near = topology.hbm
        self.stream = _MS / near.stream_bytes_per_s
        self.sort = _MS / near.ids_per_s
        self.encode = _MS / topology.encode_bytes_per_s
        self.decode = _MS / topology.decode_bytes_per_s
        self.flop = _MS / topology.fp32_flops_per_s
        self.shard = _MS * topology.shard_overhead_s
        self.overhead = _MS * topology.step_overhead_s
        self.behind_link = topology.device_host is not None
        self.link_byte = _MS / topology.device_host.bytes_per_s if topology.device_host else 0.0
        self.page_read, self.page_write, self.page_byte = _disk_ms(topology)

    def row(self, tier: Tier, size: ArrayLike) -> Floats:
        """A random read of a row of so many bytes."""
        return _MS * self.memory[tier].row_seconds(size)

    def wire_byte(self, message_bytes: float) -> float:
        """ms per byte that goes to each other rank, in messages of about this size.

        Links within and between hosts run side by side.
        """
        topology = self.topology
        near, far = topology.ranks_per_host - 1, self.world - topology.ranks_per_host
        return max(near * _per_byte(topology.intra_host, message_bytes),
                   far * _per_byte(topology.inter_host, message_bytes))

    @property
    def messages(self) -> float:
        """ms of the latency of one message to each other rank."""
        topology = self.topology
        near, far = topology.ranks_per_host - 1, self.world - topology.ranks_per_host
        return _MS * (near * topology.intra_host.latency_s + far * topology.inter_host.latency_s)

    def dense(self, model: DenseModel, batch_size: int) -> float:
        """ms of the dense part: its products and what they read and write, the sum of its
        gradients over all ranks, its optimiser.

        On devices launches run ahead of the work, and the sum runs while the backward pass goes
        on: only what exceeds that counts.
        """
        speed = self.topology.fp32_flops_per_s if model.dtype == "fp32" \
            else self.topology.bf16_flops_per_s
        layers = _MS * batch_size * model.flops_per_sample / speed + self.stream * batch_size * \
            _ACTIVATION_BYTES[model.dtype] * model.activations_per_sample
        launches = _MS * self.topology.layer_overhead_s * model.layers
        layers = max(layers, launches) if self.behind_link else layers + launches
        size = _FP32_BYTES * model.parameters
        summed = self._all_reduce(size, dense_element_bytes(model.wire) / _FP32_BYTES)
        hidden = _BACKWARD_SHARE * layers if self.behind_link else 0.0
        moved = model.update_bytes + (_REDUCE_COPIES * size if self._machine.world_size > 1 else 0)
        return layers + max(summed - hidden, 0.0) + self.stream * moved + \
            (self._coding(size) if model.wire != "fp32" else 0.0)

    def _coding(self, size: float) -> float:
        """ms to encode so many fp32 bytes and to decode what comes: others' shares of the own
        piece, and all other pieces, a rank's own share of its own piece left out."""
        world = self._machine.world_size
        return 0.0 if world == 1 else self.encode * size + self.decode * size * (2 - 1 / world)

    def _all_reduce(self, size: float, coded: float) -> float:
        """ms to sum so many bytes of all ranks: in rings inside hosts, then, of each rank's part,
        between hosts over all of a host's links.

        Args:
            size: bytes in fp32.
            coded: share of them that the codec leaves, where it is used: between hosts, or on one.
        """
        topology, inside, hosts = self._machine, self._machine.ranks_per_host, self._machine.hosts
        time = 0.0
        near = coded if hosts == 1 else 1.0
        for link, ranks, part in ((topology.intra_host, inside, size * near),
                                  (topology.inter_host, hosts, size / inside * coded)):
            if ranks > 1 and size:
                time += float(link.seconds(part / ranks, _REDUCE_PASSES * (ranks - 1)))
        return _MS * time


def _per_byte(link: Link, message_bytes: float) -> float:
    size = max(message_bytes, 1.0)
    return _MS * (float(link.seconds(size)) - link.latency_s) / size


def _disk_ms(topology: Topology) -> tuple[float, float, tuple[float, float]]:
    disk, sharers = topology.ssd, topology.ranks_per_host
    if disk is None:
        return 0.0, 0.0, (0.0, 0.0)
    return (_MS * sharers / disk.read_iops, _MS * sharers / disk.write_iops,
            (_MS * sharers / disk.read_bytes_per_s, _MS * sharers / disk.write_bytes_per_s))
