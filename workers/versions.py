"""Versions of installed packages."""

from __future__ import annotations

from importlib import metadata


def installed(package: str) -> str | None:
    """Return the version of a package, or None when it is not installed.

    Args:
        package: Its name.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
