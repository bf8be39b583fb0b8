"""``promptmill doctor``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from workers.cli.shared import FAILED, OK, UNAVAILABLE, Json, print_json

if TYPE_CHECKING:
    from workers.doctor import Check

_SIGNS = {
    "ok": ("green", "✓"),
    "skipped": ("dim", "-"),
    "warning": ("yellow", "!"),
    "error": ("red", "✗"),
}


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Look at this one instead of the settings'.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at everything a deployment rests on, and say what to mend and how.

    Python and packages, device, memory, disk, the model, Postgres with pgvector, its tables and
    indexes, Redis and how it is set up, clocks, leftovers, and whether somebody answers what waits.

    Exit codes: 0 all is well, 1 there are warnings, 3 there is an error.

    For example:

        promptmill doctor

        promptmill doctor --json | jq '.checks[] | select(.severity != "ok")'
    """
    from workers.doctor import Severity, examine, worst

    checks = []
    for check in examine(model=model):
        checks.append(check)
        if not as_json:
            _tell(check)
    severity = worst(checks)
    code = {Severity.ERROR: UNAVAILABLE, Severity.WARNING: FAILED}.get(severity, OK)
    if as_json:
        print_json({"severity": severity, "checks": [dataclasses.asdict(it) for it in checks]})
    raise typer.Exit(code)


def _tell(check: Check) -> None:
    from rich.console import Console
    from rich.text import Text

    style, sign = _SIGNS[check.severity.value]
    line = Text.assemble((sign, style), " ", (check.name, "bold"), ": ", check.found)
    if check.remedy:
        line.append(f"\n  → {check.remedy}", style=style)
    Console(highlight=False, soft_wrap=True).print(line)
