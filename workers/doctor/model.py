"""Looks at the model that workers would serve: whether it is there, whole, and fits."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError
from workers import hardware
from workers.doctor.findings import Check, error, ok, skipped, warning
from workers.endpoints import served_name

if TYPE_CHECKING:
    from workers.settings import Settings

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "*.tiktoken")


def examine(settings: Settings) -> Iterator[Check]:
    """Look at the model.

    Args:
        settings: Read from the environment.

    Yields:
        Findings.
    """
    if find_spec("vllm") is None:
        yield skipped("model", "no worker runs here")
        return
    try:
        name = served_name(settings)
    except ConfigurationError as exc:
        yield error("model", str(exc), "set PROMPTMILL_SERVED_MODEL_NAME")
        return
    if settings.model is None:
        yield from _bundled(settings.cache_dir)
        return
    from workers import hub

    if hub.is_folder(settings.model):
        folder = Path(settings.model).expanduser()
    elif (kept := hub.cached(settings.model)) is not None:
        folder = kept
    else:
        remedy = "`promptmill up` fetches it from the model hub, which takes its time"
        yield warning("model", f"{settings.model} is not on this machine yet", remedy)
        return
    yield from folder_checks(folder, name or folder.name)


def _bundled(cache_dir: Path) -> Iterator[Check]:
    from workers.bundled import bundled_folder

    try:
        folder = bundled_folder(cache_dir)
    except ConfigurationError as exc:
        yield error("model", str(exc), "install it, or set PROMPTMILL_MODEL")
        return
    if folder.is_dir():
        yield from folder_checks(folder, "the bundled model")
    else:
        yield ok("model", "the bundled model; it is unpacked at the first start")


def folder_checks(folder: Path, name: str) -> Iterator[Check]:
    """Look at a model's folder.

    Args:
        folder: Where it is.
        name: For people.

    Yields:
        Findings: the first thing that keeps it from loading, or that nothing does.
    """
    remedy = "set PROMPTMILL_MODEL to a model's folder, or fetch the model again"
    if fault := _fault(folder):
        yield error("model", f"{name} cannot be loaded: {fault}", remedy)
        return
    size = sum(file.stat().st_size for file in _weights(folder))
    whole = _device_memory()
    found = f"{name}, {size / 1e9:.2f} GB of weights"
    if size > whole:
        remedy = "use a smaller or quantised model, or several devices (--gpus 0,1)"
        yield warning("model", f"{found}, and the device has {whole / 1e9:.1f} GB", remedy)
    else:
        yield ok("model", found)


def _device_memory() -> int:
    try:
        return sum(whole for _, whole in hardware.gpu_memory_bytes().values()) or (
            hardware.memory_bytes()
        )
    except ConfigurationError:  # said by the check of the device
        return hardware.memory_bytes()


def _weights(folder: Path) -> list[Path]:
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def _fault(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder} is no folder"
    weights = _weights(folder)
    if not weights:
        return f"{folder} holds no weights"
    if weights[0].suffix == ".gguf":
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return f"{folder / 'config.json'} is missing"
    except ValueError:
        return f"{folder / 'config.json'} is not JSON"
    if not config.get("architectures"):
        return f"{folder / 'config.json'} names no architecture"
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return f"{folder} holds no tokenizer"
    return _missing_part(folder) or next(filter(None, map(_cut_short, weights)), None)


def _missing_part(folder: Path) -> str | None:
    for index in folder.glob("*.index.json"):
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return f"{index} cannot be read"
        for part in sorted(parts):
            if not (folder / part).is_file():
                return f"{folder / part} is missing"
    return None


def _cut_short(file: Path) -> str | None:
    """Compare a file's size with what its header promises (the format: a length, JSON, tensors)."""
    if file.suffix != ".safetensors":
        return None
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                return f"{file} is cut short"
            tensors = json.loads(opened.read(length))
    except (OSError, ValueError, struct.error):
        return f"{file} is not a whole safetensors file"
    ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    if file.stat().st_size < 8 + length + max(ends, default=0):
        return f"{file} is cut short"
    return None
