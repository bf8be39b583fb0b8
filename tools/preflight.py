"""Whether this machine can hold promptmill, said in one line before anything is fetched.

Run by ``tools/setup.sh`` with a bare Python, so it uses the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

MIN_MEMORY = 6 * 10**9
"""Bytes. vLLM, the bundled model, spaCy and both servers take about 5 GB."""
MIN_DISK = 8 * 10**9
"""Bytes. The packages take 3.7 GB in the cache and, on another file system, as much again."""


def memory_bytes() -> int | None:
    """Return the bytes of memory this process may use, or None when nothing says.

    A container's limit counts as well as the machine's size.
    """
    sizes = []
    with contextlib.suppress(ValueError, OSError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(sizes, default=None)


def nearest_existing(path: Path) -> Path:
    """Return ``path`` or the closest of its parents that exists."""
    while not path.exists():
        path = path.parent
    return path


def problem(root: Path) -> str | None:
    """Return what keeps promptmill from being set up under ``root``, or None."""
    if sys.platform != "linux":
        return f"promptmill runs on Linux; this is {sys.platform}"
    if shutil.which("git") is None:
        return "git is needed and was not found on the PATH"
    if not os.access(root, os.W_OK):
        return f"{root} is not writable"
    memory = memory_bytes()
    if memory is not None and memory < MIN_MEMORY:
        return f"{memory / 1e9:.1f} GB of memory; at least {MIN_MEMORY / 1e9:.0f} GB are needed"
    if (root / ".venv").exists():  # what takes the room is there already
        return None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (root, nearest_existing(cache)):
        free = shutil.disk_usage(folder).free
        if free < MIN_DISK:
            return (
                f"{free / 1e9:.1f} GB of disk are free at {folder};"
                f" at least {MIN_DISK / 1e9:.0f} GB are needed"
            )
    return None


def main() -> int:
    """Print the problem, if there is one, and return the exit status."""
    found = problem(Path(sys.argv[1]))
    if found is None:
        return 0
    print(f"promptmill setup: {found}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
