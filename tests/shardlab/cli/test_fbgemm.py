"""The ABI check of the optional fbgemm-gpu: every failure known from the field, in words."""

from __future__ import annotations

import pytest

from shardlab.cli import fbgemm
from shardlab.cli.fbgemm import check_fbgemm, explain_failure


@pytest.fixture
def world(monkeypatch):
    """Sets which packages are installed and how their import ends."""
    def set_up(installed: dict[str, str], problem: str | None = None) -> None:
        monkeypatch.setattr(fbgemm, "_installed", installed.get)
        monkeypatch.setattr(fbgemm, "_import_problem", lambda: problem)
    return set_up


@pytest.mark.parametrize(("code", "stderr", "reason"), [
    (0, "a warning", None),
    (-11, "", "its import crashes with signal 11: it was built for another torch"),
    (1, "OSError: /x/fbgemm_gpu_py.so: undefined symbol: _ZN3c1015report_overflowEPKc",
     "undefined symbol _ZN3c1015report_overflowEPKc: it was built for another torch"),
    (1, "OSError: libnvidia-ml.so.1: cannot open shared object file: No such file",
     "libnvidia-ml.so.1 is missing: this is the CUDA build, the machine has no CUDA driver"),
    (1, "ImportError: libcudart.so.12: cannot open shared object file",
     "libcudart.so.12 is missing: this is the CUDA build, the machine has no CUDA driver"),
    (1, "ImportError: libtbb.so.12: cannot open shared object file", "libtbb.so.12 is missing"),
    (1, "Traceback\n  x\nAttributeError: no such op\n", "AttributeError: no such op"),
    (3, "", "its import ends with exit code 3"),
])
def test_explain_failure(code, stderr, reason):
    assert explain_failure(code, stderr) == reason


def test_absent_is_fine_and_names_the_command(world):
    world({})
    found = check_fbgemm("2.13.0+cpu", None)
    assert (found.state, found.text) == ("ok", "not installed; optional")
    assert found.advice == 'pip install "fbgemm-gpu-cpu==1.8.*"'


def test_matching_is_fine(world):
    world({"fbgemm-gpu-cpu": "1.8.0"})
    found = check_fbgemm("2.13.0+cpu", None)
    assert (found.state, found.advice) == ("ok", "")
    assert found.text == "fbgemm-gpu-cpu 1.8.0 fits torch 2.13.0+cpu"


def test_broken_import_names_the_reason_and_the_command(world):
    world({"fbgemm-gpu": "1.9.0"}, "libnvidia-ml.so.1 is missing")
    found = check_fbgemm("2.13.0", None)
    assert found.state == "note"
    assert found.text == "fbgemm-gpu 1.9.0 cannot be used: libnvidia-ml.so.1 is missing"
    assert found.advice == \
        'pip uninstall -y fbgemm-gpu && pip install "fbgemm-gpu-cpu==1.8.*"'


def test_other_release_is_noted_even_if_it_imports(world):
    world({"fbgemm-gpu": "1.7.0"})
    found = check_fbgemm("2.13.0+cu128", "12.8")
    assert found.text == "fbgemm-gpu 1.7.0 can be imported, but torch 2.13 goes with 1.8"
    assert found.advice == ('pip uninstall -y fbgemm-gpu && pip install "fbgemm-gpu==1.8.*" '
                            "(the cu128 build, as torch is)")


def test_two_packages_at_once_are_noted(world):
    world({"fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": "1.8.0"})
    assert check_fbgemm("2.13.0", None).text.endswith("can be imported, but keep one of them")


def test_unknown_torch_names_the_known_ones(world):
    world({})
    assert check_fbgemm("3.1.0", None).advice == (
        "no fbgemm-gpu is known for torch 3.1; one is known for 2.9, 2.10, 2.11, 2.12, 2.13, 2.14")


def test_a_probe_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(fbgemm, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(fbgemm, "_TIMEOUT_S", 0.2)
    assert fbgemm._import_problem() == "its import did not end within 0.2 s"


@pytest.mark.parametrize(("probe", "reason"), [
    ("", None), ("import os; os.abort()", "its import crashes with signal 6: it was built for "
                                          "another torch"),
    ("raise OSError('libnvidia-ml.so.1: cannot open shared object file')",
     "libnvidia-ml.so.1 is missing: this is the CUDA build, the machine has no CUDA driver"),
], ids=["works", "crashes", "library"])
def test_the_probe_takes_nothing_with_it(monkeypatch, probe, reason):
    monkeypatch.setattr(fbgemm, "_PROBE", probe)
    assert fbgemm._import_problem() == reason
