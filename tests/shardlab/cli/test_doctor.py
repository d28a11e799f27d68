"""``shardlab doctor``: what it finds on odd machines, and when it calls something broken."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from shardlab.cli import findings
from shardlab.cli.findings import (
    Finding,
    machine,
    native_library,
    torch_and_devices,
    transport,
)
from shardlab.cli.main import main


def run(capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    return int(stop.value.code or 0), capsys.readouterr().out


@pytest.fixture
def no_probe(monkeypatch):
    """Leaves out the fbgemm probe, which takes seconds and has tests of its own."""
    monkeypatch.setattr("shardlab.cli.fbgemm.check_fbgemm",
                        lambda *_: Finding("fbgemm-gpu", "note", "broken", "do this"))


def test_a_working_installation_ends_with_0_and_lists_every_op(capsys, no_probe):
    from shardlab.ops.registry import describe_faces

    code, out = run(capsys)
    assert code == 0
    assert "-> do this" in out  # fbgemm is optional: a note, not an error
    for op, face, _ in describe_faces():
        assert any(op in line and face in line for line in out.split("\n"))


def test_something_needed_and_broken_ends_with_1(capsys, monkeypatch, no_probe):
    def fail() -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr("shardlab.ops.registry.native", fail)
    code, out = run(capsys)
    assert code == 1
    assert "cannot be loaded: undefined symbol: x" in out
    assert "faces of ops" not in out


def test_without_torch_the_rest_is_still_reported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    code, out = run(capsys)
    assert code == 1
    assert "cores" in out
    assert "pip install --force-reinstall torch" in out


def test_old_torch_is_broken(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    found = torch_and_devices()[0]
    assert (found.state, found.text) == ("broken", "2.8.1+cpu, older than 2.9")
    assert found.advice == 'pip install "torch>=2.9"'


def test_torch_without_gloo_is_broken(monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert torch_and_devices()[-1].state == "broken"


def test_missing_native_library_is_a_note(monkeypatch):
    monkeypatch.setattr("shardlab.ops.registry.native", lambda: None)
    assert native_library().state == "note"


def test_native_library_names_the_chosen_instruction_set(monkeypatch):
    module = SimpleNamespace(isa=lambda: "avx2", isas=lambda: ["avx2", "portable"])
    monkeypatch.setattr("shardlab.ops.registry.native", lambda: module)
    assert native_library().text == "uses avx2, of avx2, portable on this CPU"


def test_native_library_that_cannot_be_loaded_is_broken(monkeypatch):
    def fail() -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr("shardlab.ops.registry.native", fail)
    found = native_library()
    assert (found.state, found.text) == ("broken", "cannot be loaded: undefined symbol: x")


def test_transport_without_memory_files_is_gloo(monkeypatch):
    from shardlab.comm import shared_memory

    def refuse(*_: object) -> int:
        raise OSError(1, "Operation not permitted")

    assert transport().text == "shared memory where all ranks share a host, else gloo"
    monkeypatch.setattr(shared_memory.os, "memfd_create", refuse)
    assert (transport().state, transport().text) == (
        "note", "gloo: [Errno 1] Operation not permitted")


def by_subject(name: str) -> Finding:
    return next(found for found in machine() if found.subject == name)


def test_cpu_features_are_named(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512fx f16c\n")
    monkeypatch.setattr(findings, "_CPUINFO", file)
    assert by_subject("cpu").text == "Some CPU; avx2, f16c"


@pytest.mark.parametrize(("text", "state", "found"), [
    ("always [madvise] never", "ok", "madvise"), ("always madvise [never]", "note", "never"),
])
def test_huge_pages(monkeypatch, tmp_path, text, state, found):
    file = tmp_path / "enabled"
    file.write_text(text)
    monkeypatch.setattr(findings, "_HUGE_PAGES", file)
    result = by_subject("transparent huge pages")
    assert result.state == state
    assert result.text.startswith(found)


@pytest.mark.parametrize(("size", "state"), [(64 << 20, "note"), (8 << 30, "ok")])
def test_shared_memory(monkeypatch, tmp_path, size, state):
    monkeypatch.setattr(findings, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(findings.shutil, "disk_usage", lambda _: SimpleNamespace(total=size))
    assert by_subject("shared memory").state == state


def test_systems_without_proc_are_no_error(monkeypatch, tmp_path):
    for name in ("_CPUINFO", "_MEMINFO", "_HUGE_PAGES", "_SHARED_MEMORY"):
        monkeypatch.setattr(findings, name, tmp_path / "absent")
    assert {found.state for found in machine()} == {"ok"}
