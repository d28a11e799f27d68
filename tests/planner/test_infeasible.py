"""Errors say what did not fit, by how much, and changes that do help."""

from __future__ import annotations

import re

import pytest

from shardlab.errors import PlanError
from shardlab.planner import plan
from shardlab.planner.topology import Topology
from shardlab.specs import EmbeddingBagConfig, ShardingType
from tests.planner.fleets import machine, tiered


def big(name: str = "big", rows: int = 100_000_000,
        sharding: ShardingType | None = None) -> EmbeddingBagConfig:
    """A table of 23.84 GiB without optimiser state."""
    return EmbeddingBagConfig(rows, 64, name, sharding=sharding)


def message(tables: list[EmbeddingBagConfig], machine_name: str, optimizer: str = "sgd",
            batch_size: int = 64, topology: Topology | None = None) -> str:
    with pytest.raises(PlanError) as error:
        plan(tables, topology or machine(machine_name), batch_size, optimizer)
    return str(error.value)


def test_too_little_memory_in_all() -> None:
    text = message([big(), big("big2")], "2x2xcpu")
    assert re.search(r"the 2 tables need 47\.\d+ GiB with optimiser state \(sgd\) and exchange "
                     r"buffers; the 4 ranks of 2x2xcpu hold 43\.2 GiB \(10\.8 GiB each after the "
                     r"reserve\): short by 4\.\d+ GiB", text)
    assert "  - 3 hosts of 2 ranks instead of 2" in text
    assert re.search(r"  - 13\.\d+ GiB of memory per rank instead of 12 GiB", text)


def test_named_changes_do_help() -> None:
    tables = [big(), big("big2")]
    text = message(tables, "2x2xcpu")
    assert plan(tables, machine("3x2xcpu"), 64, "sgd").ranks
    memory = re.search(r"(\S+) GiB of memory per rank", text)
    assert memory is not None
    assert plan(tables, machine("2x2xcpu", float(memory[1]) * 2**30 * 1.001), 64, "sgd").ranks


def test_leaner_optimizer_is_named() -> None:
    text = message([big()], "3xcpu", "adam")
    assert "  - optimizer row_wise_adagrad instead of adam" in text
    assert plan([big()], machine("3xcpu"), 64, "row_wise_adagrad").ranks


def test_asked_sharding_is_named() -> None:
    tables = [big(sharding=ShardingType.TABLE_WISE), EmbeddingBagConfig(10, 64, "small")]
    text = message(tables, "4xcpu")
    assert re.search(
        r"table 'big' \(100,000,000 x 64\) does not fit: table_wise over 1 rank, the sharding it "
        r"asks for, needs 23\.\d+ GiB on one rank; a rank of 4xcpu holds 10\.8 GiB: "
        r"short by 13\.\d+ GiB", text)
    assert "let the planner choose the sharding of table 'big' (asked: table_wise)" in text


def test_smaller_batch_is_named() -> None:
    table = EmbeddingBagConfig(20_000_000, 64, "t", pooling_factor=200.0)
    text = message([table], "cpu", batch_size=2**21)
    assert "  - a batch of 1048576 samples per rank instead of 2097152" in text
    assert plan([table], machine("cpu"), 2**20, "sgd").ranks


def test_whole_tables_that_do_not_pack() -> None:
    # Three tables of 7.2 GiB have room on two ranks of 10.8 GiB by their sum only.
    tables = [EmbeddingBagConfig(30_000_000, 64, f"t{i}", sharding=ShardingType.TABLE_WISE)
              for i in range(3)]
    text = message(tables, "2xcpu")
    assert re.search(r"table 't\d' found no room: it needs 7\.\d+ GiB on one rank, and no rank of "
                     r"2xcpu \(10\.8 GiB each\) has that much left", text)
    assert "let the planner choose the sharding of table 't0' (asked: table_wise)" in text


def test_hopeless_requests_say_so() -> None:
    tables = [big(f"big{i}", 10**11, ShardingType.TABLE_WISE) for i in range(2)]
    text = message(tables, "2xcpu")
    assert "short by" in text
    assert "of memory per rank instead of 12 GiB" in text


def test_a_full_disk_is_named() -> None:
    storage = {"dtype": "fp32", "tier": "ssd"}
    tables = [EmbeddingBagConfig(100_000_000, 64, "t", storage=storage)]
    text = message(tables, "", topology=tiered("2xcpu", 4 << 30, 1 << 30, 20 << 30))
    assert re.search(r"table 't' .* does not fit: .*needs 3\d\.?\d* GiB on one host's ssd; a host "
                     r"of 2xcpu holds 20 GiB: short by \d", text)
    assert "let table 't' lie on any tier (asked: ssd)" not in text
    assert "storage bf16 instead of fp32" in text


def test_a_tier_that_tables_ask_for_is_named() -> None:
    tables = [EmbeddingBagConfig(3_000_000, 64, f"t{i}", storage={"dtype": "fp32", "tier": "hbm"})
              for i in range(4)]
    topology = tiered("2xcpu", 1 << 30, 64 << 30)
    text = message(tables, "", topology=topology)
    assert re.search(r"the tables need 2\.\d+ GiB of hbm wherever they lie; 2xcpu has 1\.8 GiB: "
                     r"short by", text)
    assert "of memory per rank instead of 1 GiB" in text
    freed = [EmbeddingBagConfig(3_000_000, 64, f"t{i}") for i in range(4)]
    assert plan(freed, topology, 64, "sgd").ranks


def test_ranks_that_tables_ask_for_are_named() -> None:
    tables = [EmbeddingBagConfig(30_000_000, 64, f"t{i}", ranks=(0,)) for i in range(2)]
    text = message(tables, "4xcpu")
    assert "let table 't0' lie on any rank (asked: [0])" in text


def test_lower_tiers_are_counted() -> None:
    tables = [big(), big("big2")]
    text = message(tables, "", topology=tiered("2xcpu", 4 << 30, 10 << 30, 20 << 30))
    assert re.search(r"the 2 ranks of 2xcpu hold 7\.2 GiB \(3\.6 GiB each after the reserve\) and "
                     r"the hosts 9 GiB of ddr, 20 GiB of ssd: short by 11", text)
    assert "of ddr per host instead of 10 GiB" in text
