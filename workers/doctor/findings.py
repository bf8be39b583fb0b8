"""What the doctor says of one thing that it looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    SKIPPED = "skipped"  # could not be looked at, or does not apply
    OK = "ok"
    WARNING = "warning"  # it works, and will not for ever
    ERROR = "error"  # jobs cannot be accepted, or can be lost


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding."""

    name: str  # of what was looked at
    severity: Severity
    found: str  # one sentence
    remedy: str | None = None  # what to do about it


def ok(name: str, found: str) -> Check:
    """Return that a thing is well."""
    return Check(name=name, severity=Severity.OK, found=found)


def skipped(name: str, found: str) -> Check:
    """Return why a thing was not looked at."""
    return Check(name=name, severity=Severity.SKIPPED, found=found)


def warning(name: str, found: str, remedy: str) -> Check:
    """Return a fault that can wait."""
    return Check(name=name, severity=Severity.WARNING, found=found, remedy=remedy)


def error(name: str, found: str, remedy: str) -> Check:
    """Return a fault that cannot."""
    return Check(name=name, severity=Severity.ERROR, found=found, remedy=remedy)


def worst(checks: Iterable[Check]) -> Severity:
    """Return the severity of the worst finding; OK when there is none."""
    order = list(Severity)
    return max((check.severity for check in checks), key=order.index, default=Severity.OK)
