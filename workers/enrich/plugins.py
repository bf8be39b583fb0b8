"""Enrichers of other packages: the entry-point group ``promptmill.enrichers``.

An entry names a factory that takes no argument and returns an `Enricher`. A package declares it
in its ``pyproject.toml``::

    [project.entry-points."promptmill.enrichers"]
    words = "my_package:WordCounter"
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection
from dataclasses import dataclass

from workers.engine.protocols import Enricher
from workers.enrich.aside import Aside

GROUP = "promptmill.enrichers"


@dataclass(frozen=True, kw_only=True)
class BrokenPlugin:
    """An entry that could not be used; the others work all the same."""

    name: str  # of the entry
    origin: str  # distribution and object that it points to
    reason: str  # for people


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """What was found installed."""

    enrichers: tuple[Enricher, ...]  # each aside, on a thread of its own
    broken: tuple[BrokenPlugin, ...]


def load_plugins() -> Plugins:
    """Load every installed enricher.

    Returns:
        The enrichers in the order of their entries' names, and the entries that failed.
    """
    enrichers: dict[str, Enricher] = {}
    broken: list[BrokenPlugin] = []
    entries = importlib.metadata.entry_points(group=GROUP)
    for entry in sorted(entries, key=lambda item: (item.name, item.value)):
        try:
            enricher = _load(entry, taken=enrichers)
        except Exception as exc:  # noqa: BLE001  of somebody else's package; it is named
            broken.append(
                BrokenPlugin(
                    name=entry.name, origin=_origin(entry), reason=f"{type(exc).__name__}: {exc}"
                )
            )
        else:
            enrichers[enricher.name] = Aside(enricher)
    return Plugins(enrichers=tuple(enrichers.values()), broken=tuple(broken))


def _load(entry: importlib.metadata.EntryPoint, *, taken: Collection[str]) -> Enricher:
    enricher = entry.load()()
    if not isinstance(enricher, Enricher):
        msg = f"{entry.value} gives a {type(enricher).__name__} without name, enrich and aclose"
        raise TypeError(msg)
    if enricher.name in taken:
        msg = f"an enricher named {enricher.name!r} is there already"
        raise ValueError(msg)
    return enricher


def _origin(entry: importlib.metadata.EntryPoint) -> str:
    distribution = entry.dist.name if entry.dist is not None else "an unknown distribution"
    return f"{entry.value} of {distribution}"
