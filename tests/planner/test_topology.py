"""Profiles by name, files, and what is said about wrong ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardlab.errors import ConfigError
from shardlab.planner.profiles import PROFILES
from shardlab.planner.this_machine import local_cpu
from shardlab.planner.topology_file import read_topology

GIB = 1 << 30


@pytest.mark.parametrize(("name", "hosts", "ranks"), [
    ("cpu", 1, 1), ("2xcpu", 1, 2), ("8xh100", 1, 8), ("16x8xa100-80gb", 16, 8),
    ("2x1xh200", 2, 1)])
def test_read_topology_sizes(name: str, hosts: int, ranks: int) -> None:
    topology = read_topology(name)
    assert (topology.hosts, topology.ranks_per_host) == (hosts, ranks)
    assert topology.world_size == hosts * ranks
    assert topology.name == name


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_are_plausible(name: str) -> None:
    topology = read_topology(name)
    assert topology.hbm_bytes * (1 - topology.reserved_fraction) == pytest.approx(
        topology.capacity, abs=1)
    assert topology.hbm.rows_per_s < topology.hbm.stream_bytes_per_s
    assert topology.inter_host.bytes_per_s < topology.intra_host.bytes_per_s \
        < topology.hbm.stream_bytes_per_s


def test_cpu_profile_fits_the_measured_random_rows() -> None:
    memory = read_topology("cpu").hbm
    for size, measured in ((64, 43e6), (128, 32e6), (256, 21e6), (512, 12e6)):
        rate = 1 / (1 / memory.rows_per_s + size / memory.row_bytes_per_s)
        assert rate == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("name", "hint"), [
    ("8xh10", "did you mean '8xh100'"), ("hh100", "did you mean 'h100'"),
    ("8xa100-40g", "did you mean '8xa100-40gb'"), ("x8xh100", "known profiles"),
    ("2x2x2xh100", "known profiles"), ("", "known profiles")])
def test_read_topology_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="unknown topology") as error:
        read_topology(name)
    assert hint in str(error.value)
    assert all(profile in str(error.value) for profile in PROFILES)


def test_read_topology_zero_ranks() -> None:
    with pytest.raises(ConfigError, match=r"'0xh100': ranks_per_host must be at least 1, found 0"):
        read_topology("0xh100")


def test_read_file_on_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("profile: 8xh100\nhosts: 4\nhbm_bytes: 64 GiB\n"
                    "inter_host: {bytes_per_s: 25 GB/s, latency_s: 7 us}\n"
                    "hbm: {rows_per_s: 1.0e9}\n")
    topology = read_topology(path)
    base = read_topology("8xh100")
    assert (topology.hosts, topology.ranks_per_host) == (4, 8)
    assert topology.hbm_bytes == 64 * GIB
    assert topology.inter_host.bytes_per_s == 25e9
    assert topology.inter_host.latency_s == pytest.approx(7e-6)
    assert topology.hbm == replace(base.hbm, rows_per_s=1e9)
    assert topology.intra_host == base.intra_host
    assert topology.name == "ours (8xh100)"


def test_read_file_without_a_profile_lists_everything_missing(tmp_path: Path) -> None:
    path = tmp_path / "bare.yaml"
    path.write_text("hosts: 2\nhbm: {rows_per_s: 1}\n")
    with pytest.raises(ConfigError) as error:
        read_topology(str(path))
    text = str(error.value)
    for field in ("ranks_per_host", "hbm_bytes", "hbm.stream_bytes_per_s", "intra_host"):
        assert f"field {field!r} is missing" in text


def test_read_file_lists_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("profile: h100\nhbm_byte: 3\nhosts: 1.5\nddr_bytes: 3 GiBB\n"
                    "hbm: 7\nintra_host: {latency: 3}\nstep_overhead_s: .inf\n"
                    "shard_overhead_s: true\n")
    with pytest.raises(ConfigError) as error:
        read_topology(path)
    text = "\n".join(error.value.problems)
    assert len(error.value.problems) == 7
    assert "unknown field 'hbm_byte' (did you mean 'hbm_bytes'?)" in text
    assert "field 'hosts': expected a whole number, found 1.5" in text
    assert "field 'ddr_bytes': expected a number" in text
    assert "'3 GiBB'" in text
    assert "field 'hbm': expected a mapping, found 7" in text
    assert "unknown field 'intra_host.latency' (did you mean 'latency_s'?)" in text
    assert "field 'step_overhead_s'" in text
    assert "field 'shard_overhead_s'" in text


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 2]", "expected a mapping"), ("a: [", "not YAML"), ("", "expected a mapping")],
    ids=["list", "syntax", "empty"])
def test_read_file_not_a_mapping(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "odd.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_topology(path)


def test_read_file_absent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_topology(tmp_path / "nowhere.yaml")


def test_topology_refuses_impossible_numbers() -> None:
    base = read_topology("h100")
    with pytest.raises(ConfigError) as error:
        replace(base, hbm_bytes=0, reserved_fraction=1.0,
                hbm=replace(base.hbm, rows_per_s=0.0),
                intra_host=replace(base.intra_host, latency_s=-1.0))
    assert [problem.split(": ")[1].split(" ")[0] for problem in error.value.problems] == [
        "hbm_bytes", "hbm.rows_per_s", "intra_host.latency_s", "reserved_fraction"]


def test_local_cpu_divides_this_machine() -> None:
    one, three = local_cpu(1), local_cpu(3)
    assert three.hbm_bytes == one.hbm_bytes // 3
    assert three.world_size == 3
    assert one.hbm == read_topology("cpu").hbm
