"""Costs of rows by where and how they are held."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardlab.log_layout import CLEANING
from shardlab.planner.holding import Holding, holding
from shardlab.planner.speeds import Speeds
from shardlab.planner.topology_file import read_topology
from shardlab.storage_text import parse_storage

GPU, CPU = read_topology("8xh100"), read_topology("2xcpu")


def held(storage: object, topology: str = "gpu", *, columns: int = 64,
         optimizer: str = "row_wise_adagrad", rows: int = 10**6) -> Holding:
    machine = GPU if topology == "gpu" else CPU
    spec = parse_storage(storage, "t")
    return holding(spec, rows, columns, optimizer, Speeds(machine))  # type: ignore[arg-type]


def test_rows_in_memory() -> None:
    found = held({"dtype": "fp32", "tier": "hbm"})
    assert found.read_ms == pytest.approx(1e3 * float(GPU.hbm.row_seconds(256)))
    assert found.update_ms == pytest.approx(
        1e3 * GPU.hbm.rewrite_factor * float(GPU.hbm.row_seconds(260)))
    assert not found.fetches


def test_rows_behind_a_link_cross_it() -> None:
    near, far = (held({"dtype": "fp32", "tier": tier}) for tier in ("hbm", "ddr"))
    assert GPU.device_host is not None
    assert far.read_ms == pytest.approx(1e3 * (
        float(GPU.ddr.row_seconds(256)) + 256 / GPU.device_host.bytes_per_s))
    assert far.read_ms > 5 * near.read_ms
    assert far.update_ms > 5 * near.update_ms


def test_host_memory_is_near_without_a_device() -> None:
    near, far = (held({"dtype": "fp32", "tier": tier}, "cpu") for tier in ("hbm", "ddr"))
    assert near == far


def test_narrow_rows_are_coded() -> None:
    found = held({"dtype": "int8", "tier": "hbm"})
    decode, encode = 256 / GPU.decode_bytes_per_s, 256 / GPU.encode_bytes_per_s
    assert found.read_ms == pytest.approx(1e3 * (float(GPU.hbm.row_seconds(65)) + decode))
    assert found.update_ms == pytest.approx(1e3 * (
        GPU.hbm.rewrite_factor * float(GPU.hbm.row_seconds(69)) + decode + encode))


def test_disks_read_pages_by_the_ranks_share() -> None:
    found = held({"dtype": "fp32", "tier": "ssd"})
    assert GPU.ssd is not None
    assert found.page_read_ms == pytest.approx(max(8e3 / GPU.ssd.read_iops,
                                                   8e3 * 4096 / GPU.ssd.read_bytes_per_s))
    assert found.page_write_ms >= 8e3 / GPU.ssd.write_iops
    assert found.records == 4088 // 260
    assert found.written_bytes == pytest.approx(CLEANING * (260 + 4))
    assert found.read_ms == found.update_ms == 0


def test_chains_fetch_from_level_to_level() -> None:
    levels = [{"dtype": "fp32", "tier": "hbm", "fraction": 0.01},
              {"dtype": "fp32", "tier": "ddr", "fraction": 0.1}, {"dtype": "fp32", "tier": "ssd"}]
    found = held({"levels": levels})
    plain = held({"dtype": "fp32", "tier": "hbm"})
    assert (found.read_ms, found.update_ms) == (plain.read_ms, plain.update_ms)
    first, second = found.fetches
    assert (first.fraction, first.records) == (0.01, 0)
    assert (second.fraction, second.records) == (0.1, 4088 // 260)
    disk = held({"dtype": "fp32", "tier": "ssd"})
    # Rows that go back are appended: a few of their own bytes, and no page of theirs is read.
    assert second.page_ms == pytest.approx(disk.page_read_ms)
    assert second.row_ms < disk.page_write_ms / 4
    assert 260 < second.written_bytes < 4 * 260


def test_pruned_rows_are_cheaper_to_move_and_need_an_index() -> None:
    pruned = {"kind": "pruned", "budget": {"ratio": 0.1}, "tier": "hbm"}
    found, plain = held(pruned, columns=1024), held({"dtype": "fp32", "tier": "hbm"}, columns=1024)
    assert found.read_ms < 0.3 * plain.read_ms
    assert held(pruned, columns=4).read_ms > held({"dtype": "fp32", "tier": "hbm"},
                                                  columns=4).read_ms


def test_speeds_without_a_disk() -> None:
    speeds = Speeds(replace(GPU, ssd=None))
    assert (speeds.page_read, speeds.page_write) == (0, 0)


def test_tensor_trains_multiply_slices_of_cores() -> None:
    shape = {"kind": "tensor_train", "rank": 8, "tier": "hbm"}
    found = held(shape)  # 64 columns: cores of 1 x 4 x 8, 8 x 4 x 8, 8 x 4 x 1
    products = 2 * 4 * 8 * 4 * 8 + 2 * 16 * 8 * 4
    cores = float(GPU.hbm.row_seconds(4 * (4 * 8 + 8 * 4 * 8 + 8 * 4)))
    assert found.read_ms == pytest.approx(1e3 * (products / GPU.fp32_flops_per_s + cores))
    assert found.update_ms == pytest.approx(3 * found.read_ms)
    cached = held({**shape, "cache_fraction": 0.1})
    assert cached.read_ms < found.read_ms
    assert cached.fetches[0].fraction == 0.1


def test_tensor_trains_that_cannot_be_are_never_taken() -> None:
    factors = {"kind": "tensor_train", "rank": 8, "row_factors": [10, 10, 10]}
    assert held(factors).read_ms == 0
