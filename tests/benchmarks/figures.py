"""`Figure`: one measured number, with its unit, its target and what it is compared with."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that a benchmark found."""

    name: str
    value: float
    unit: str = ""  # of the value; empty for a ratio
    at_least: float | None = None  # the target, where more is better
    at_most: float | None = None  # the target, where less is better
    comparison: str = ""  # what it stands beside: the peer, or the other side's value

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target."""
        if self.at_least is None and self.at_most is None:
            return None
        high = math.inf if self.at_most is None else self.at_most
        return (self.at_least if self.at_least is not None else -math.inf) <= self.value <= high

    @property
    def target(self) -> str:
        """The target as people write it; empty without one."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"


class Measure(Protocol):
    """What each benchmark module offers under the name ``figures``."""

    def __call__(self, *, quick: bool) -> Sequence[Figure]:
        """Measure; `quick` asks for a shorter run whose figures are rougher."""
        ...


def flattened(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings under dotted names.

    Args:
        found: Numbers, mappings of them, and other values, which are passed over.
        prefix: Put before every name.
    """
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


@contextmanager
def words_on_stderr() -> Iterator[None]:
    """Send what anybody prints meanwhile, child processes included, to standard error."""
    import os

    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def alone(measure: Measure, about: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run one benchmark from the shell: ``python -m tests.benchmarks.NAME [--json] [--quick]``.

    Args:
        measure: The module's ``figures``.
        about: The module's docstring.
        arguments: Of the command line; None reads the process' own.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument("--quick", action="store_true", help="a shorter run with rougher figures")
    chosen = parser.parse_args(arguments)
    with words_on_stderr():
        found = measure(quick=chosen.quick)
    if chosen.json:
        print(json.dumps({figure.name: figure.value for figure in found}))
        return
    for figure in found:
        said = f"{figure.value:,.4g} {figure.unit}".strip()
        print(f"{figure.name:44} {said:>20}  {figure.target:>10}  {figure.comparison}")


def packed(found: Sequence[Figure]) -> str:
    """Write figures as one line of JSON, for `unpacked`."""
    return json.dumps([asdict(figure) for figure in found])


def unpacked(line: str) -> list[Figure]:
    """Read figures that `packed` wrote."""
    return [Figure(**fields) for fields in json.loads(line)]
