"""Progress on standard error, where a person can see it; silence everywhere else."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.cli.shared import for_people

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workers.batch_progress import BatchProgress

_CHUNK = 1 << 22
_COUNT_UP_TO_BYTES = 1 << 31


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """Show that something takes a while.

    Args:
        what: In words.

    Yields:
        A function that is told what happens meanwhile.
    """
    if not for_people():
        yield lambda _text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda text: status.update(f"{what}: {text}")


@contextlib.contextmanager
def batch_progress(source: str) -> Iterator[Callable[[BatchProgress], None]]:
    """Show how far a batch run is.

    Args:
        source: Input file, whose lines are counted when that is cheap.

    Yields:
        A function to call with each change.
    """
    if not for_people():
        yield lambda _progress: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=_lines(source), rate="")

        def show(progress: BatchProgress) -> None:
            done = progress.kept + progress.written
            total = progress.read if progress.read_all else None
            # The engine's start is not the batch's: the rate counts what this run has written.
            seconds = max(progress.elapsed_s, 1e-9)
            words = [f"{progress.written / seconds:.1f} rows/s"]
            if progress.completion_tokens:
                words.append(f"{progress.completion_tokens / seconds:.0f} tokens/s")
            if progress.answered:
                words.append(f"{progress.cached_share:.0%} from cache")
            if progress.failed:
                words.append(f"[red]{progress.failed} failed[/red]")
            # A total of None leaves the one that is known as it is.
            bar.update(task, completed=done, total=total, rate=", ".join(words))

        yield show


@contextlib.contextmanager
def batch_waiting() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show how far a batch is that was submitted.

    Yields:
        A function to call with what `workers.batch_jobs.describe` returns.
    """
    if not for_people():
        yield lambda _described: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=None)

        def show(described: dict[str, Any]) -> None:
            counts = described["request_counts"]
            over, failed = counts["completed"] + counts["failed"], counts["failed"]
            words = f"{over}/{counts['total']} rows" + (f", {failed} failed" if failed else "")
            bar.update(task, completed=over, total=counts["total"], description=words)

        yield show


def _lines(source: str) -> int | None:
    path = Path(source)
    if source == "-" or source.endswith((".gz", ".zst")) or not path.is_file():
        return None
    if path.stat().st_size > _COUNT_UP_TO_BYTES:
        return None
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b"")) or None
