"""What this machine has: graphics cards, memory, disk. Nothing here touches CUDA."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from schema.errors import ConfigurationError

_ASK_S = 20.0
_CARD = re.compile(r"^GPU (\d+): (.+?) \(UUID: (GPU-[\w-]+)\)")
_SLICE = re.compile(r"^\s+MIG .*\(UUID: (MIG-[\w/-]+)\)")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_CGROUP_USED = (
    Path("/sys/fs/cgroup/memory.current"),
    Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
_CGROUP_STATS = (
    Path("/sys/fs/cgroup/memory.stat"),
    Path("/sys/fs/cgroup/memory/memory.stat"),
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A graphics card, as ``nvidia-smi -L`` lists it."""

    index: int  # by bus order
    name: str
    uuid: str  # GPU-…
    slices: tuple[str, ...] = ()  # MIG-… names of its parts, if it is divided

    def answers_to(self, name: str) -> bool:
        """Whether an index, a UUID (or its beginning) or a MIG name means this card or a part."""
        if name.isdigit():
            return int(name) == self.index
        # CUDA takes the beginning of a UUID too.
        return self.uuid.startswith(name) or any(part.startswith(name) for part in self.slices)


def gpus(listing: str | None = None) -> list[Gpu] | None:
    """Return the NVIDIA cards of this machine.

    Args:
        listing: What ``nvidia-smi -L`` printed; None runs it.

    Returns:
        The cards in bus order; None where nothing can tell, for lack of the tool.

    Raises:
        ConfigurationError: The tool is there and cannot reach the driver.
    """
    if listing is None:
        if shutil.which("nvidia-smi") is None:
            return None
        listing = _ask_nvidia("-L")
    cards: list[Gpu] = []
    for line in listing.splitlines():
        if card := _CARD.match(line):
            cards.append(Gpu(index=int(card[1]), name=card[2], uuid=card[3]))
        elif (part := _SLICE.match(line)) and cards:
            last = cards[-1]
            cards[-1] = Gpu(
                index=last.index, name=last.name, uuid=last.uuid, slices=(*last.slices, part[1])
            )
    return cards


def gpu_memory_bytes() -> dict[str, tuple[int, int]]:
    """Return used and whole memory by card's UUID, in bytes; empty where nothing can tell.

    Raises:
        ConfigurationError: The driver cannot be reached.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    query = "--query-gpu=uuid,memory.used,memory.total"
    found = {}
    for line in _ask_nvidia(query, "--format=csv,noheader,nounits").splitlines():
        uuid, used, total = (word.strip() for word in line.split(","))
        found[uuid] = (int(used) * 2**20, int(total) * 2**20)
    return found


def _ask_nvidia(*words: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *words],  # noqa: S607  wherever the driver put it
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ASK_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        msg = f"nvidia-smi does not answer ({type(exc).__name__}); look at the driver"
        raise ConfigurationError(msg) from exc
    if done.returncode != 0:
        said = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[0]
        msg = f"nvidia-smi cannot reach the driver; it says: {said}"
        raise ConfigurationError(msg)
    return done.stdout


def memory_bytes() -> int:
    """Return the bytes of memory this process may use: the machine's, or its container's limit."""
    limit = _number_in(_CGROUP_LIMITS)
    return min(_meminfo("MemTotal"), limit) if limit else _meminfo("MemTotal")


def available_memory_bytes() -> int:
    """Return the bytes of memory that are free, or would be if caches were dropped."""
    free = _meminfo("MemAvailable")
    limit, used = _number_in(_CGROUP_LIMITS), _number_in(_CGROUP_USED)
    if not limit or used is None:
        return free
    # What only caches files is given up when somebody wants it.
    return max(0, min(free, limit - used + _inactive_file_bytes()))


def free_disk_bytes(folder: Path) -> int:
    """Return the bytes of disk free where a folder is, or will be.

    Args:
        folder: It need not exist yet.
    """
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cpu_flags() -> frozenset[str]:
    """Return what the processor can do, in Linux' words; empty where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _inactive_file_bytes() -> int:
    for path in _CGROUP_STATS:
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text(encoding="ascii").splitlines():
                if line.startswith("inactive_file "):
                    return int(line.split()[1])
    return 0


def _number_in(paths: tuple[Path, ...]) -> int | None:
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            return int(path.read_text(encoding="ascii"))
    return None
