"""Cost against size: batch files of growing length, and a growing store of answers.

    python -m tests.benchmarks.sizes --docs docs     # also writes the table and the plot there

The engine is a stand-in (`tests.benchmarks.stand_in`) that answers at once, so the figures are of
all that is around vLLM: reading the file, submission, queue, claim, commit, publication, output.
A real model is slower than any of it. Everything else is the real thing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from uuid import uuid4

import psutil
from sqlalchemy import text

from tests.benchmarks import chat_rows
from tests.benchmarks.deployed import Deployed, deployed, say
from tests.benchmarks.figures import Figure, words_on_stderr
from tests.benchmarks.sizes_report import write_report
from tests.benchmarks.stand_in import MODEL, stand_in_answer
from workers.batch import BatchOptions, run_batch
from workers.store.answers import PostgresAnswers
from workers.store.database import Database

FILES = (1_000, 10_000, 100_000, 1_000_000)
STORED = (0, 10_000, 1_000_000)
_QUICK_FILES, _QUICK_STORED = (1_000, 5_000), (0, 10_000)
_LOOKED_UP = 500
_JOBS = 3_000  # of the file that runs against each size of the store
_NAMESPACE = "stored"

# Rows as a worker writes them, but for the words: what a look-up costs is decided by the index.
_FILL = text(
    """
    INSERT INTO answers (id, namespace, fingerprint, engine, model, prompt, outputs, digest,
                         prompt_tokens, completion_tokens)
    SELECT gen_random_uuid(), :namespace, sha256(CAST('filler ' || n AS bytea)), 'stand-in',
           :model, 'filler ' || n, CAST(:outputs AS jsonb), sha256('filler'), 10, 24
    FROM generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS n
    """
)


@dataclass(frozen=True, kw_only=True)
class FileRun:
    """One batch file, from its first row read to its last line written."""

    rows: int
    seconds: float
    client_mb: float  # resident memory at its highest
    worker_mb: float
    worker_grew_mb: float  # beyond what it held when it was ready, before its first row
    processor_us: float  # a row, all parts together

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


@dataclass(frozen=True, kw_only=True)
class StoreRun:
    """Costs against a store of one size."""

    stored: int
    look_up_ms: float  # p50 of one exact look-up that finds its answer
    missed_rate: float  # rows a second, none of them stored
    found_rate: float  # rows a second, all of them stored and none in memory


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All of it."""

    files: list[FileRun]
    stores: list[StoreRun]


def figures(*, quick: bool) -> list[Figure]:
    """Measure with files up to 100,000 rows, and all sizes of the store.

    Args:
        quick: Smaller files and stores.
    """
    files: tuple[int, ...] = _QUICK_FILES if quick else FILES[:-1]
    found = asyncio.run(_measure(files, _QUICK_STORED if quick else STORED))
    return [*_of_files(found.files), *_of_stores(found.stores)]


def _of_files(runs: Sequence[FileRun]) -> list[Figure]:
    return [
        Figure(name=f"{run.rows}_rows.{name}", value=value, unit=unit, at_most=most)
        for run in runs
        for name, value, unit, most in (
            ("rate", run.rate, "rows/s", None),
            ("processor", run.processor_us, "µs/row", None),
            ("client_memory", run.client_mb, "MB", 300.0),
            ("worker_memory", run.worker_mb, "MB", None),
            ("worker_growth", run.worker_grew_mb, "MB", 200.0),
        )
    ]


def _of_stores(runs: Sequence[StoreRun]) -> list[Figure]:
    return [
        Figure(name=f"{run.stored}_stored.{name}", value=value, unit=unit)
        for run in runs
        for name, value, unit in (
            ("look_up_p50", run.look_up_ms, "ms"),
            ("missed_rate", run.missed_rate, "rows/s"),
            ("found_rate", run.found_rate, "rows/s"),
        )
    ]


async def _measure(
    files: Sequence[int],
    stored: Sequence[int],
    *,
    so_far: Callable[[Sizes], None] = lambda _: None,
) -> Sizes:
    """Measure both; `so_far` is told after each size, for the longest file takes its time."""
    found = Sizes(files=[], stores=[])
    with tempfile.TemporaryDirectory(prefix="promptmill-rows-") as name:
        folder = Path(name)
        async with deployed(stand_in=True) as system:
            async for run in _stores(system, folder, stored):
                found.stores.append(run)
        async with deployed(stand_in=True) as system:
            ready_mb = _resident_mb(system.worker)
            for rows in files:
                found.files.append(await _file(system, folder, rows, ready_mb))
                so_far(found)
    return found


async def _file(system: Deployed, folder: Path, rows: int, ready_mb: float) -> FileRun:
    source = folder / f"{rows}.jsonl"
    _write(source, rows, start=0)
    peak = _Peak(system)
    before = sum(system.processor_s().values())
    async with peak.watched():
        took = await _run(system, source, namespace=f"rows-{rows}", expected="generated")
    spent = sum(system.processor_s().values()) - before
    run = FileRun(
        rows=rows,
        seconds=took,
        client_mb=peak.client_mb,
        worker_mb=peak.worker_mb,
        worker_grew_mb=peak.worker_mb - ready_mb,
        processor_us=spent / rows * 1e6,
    )
    say(f"{rows} rows: {run.rate:.0f} a second")
    source.unlink()
    return run


def _write(path: Path, rows: int, *, start: int) -> None:
    with path.open("w") as file:
        for number, question in enumerate(islice(chat_rows.questions(), start, start + rows)):
            file.write(json.dumps(chat_rows.row(f"row-{number}", question)) + "\n")


async def _run(system: Deployed, source: Path, *, namespace: str, expected: str) -> float:
    target = source.with_suffix(".out.jsonl")
    options = BatchOptions(namespace=namespace)
    summary = await run_batch(system.client, str(source), str(target), options)
    target.unlink()
    if summary.failed or set(map(str, summary.provenance)) - {expected}:
        msg = f"{source.name}: {summary.failed} failed, the others {dict(summary.provenance)}"
        raise RuntimeError(msg)
    return summary.elapsed_s


class _Peak:
    """The highest resident memory of client and worker while something runs."""

    def __init__(self, system: Deployed) -> None:
        self._processes = (psutil.Process(), system.worker)
        self.client_mb = self.worker_mb = 0.0

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch(), name="benchmark memory")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._look()

    async def _watch(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(0.2)

    def _look(self) -> None:
        client, worker = map(_resident_mb, self._processes)
        self.client_mb = max(self.client_mb, client)
        self.worker_mb = max(self.worker_mb, worker)


def _resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 1e6)


async def _stores(system: Deployed, folder: Path, sizes: Sequence[int]) -> AsyncIterator[StoreRun]:
    database = (await system.client.connection()).require_database()
    filled = 0
    for number, size in enumerate(sizes):
        await _fill(database, filled, size)
        filled = size
        looked_up = await _looked_up(database)
        source = folder / f"store-{size}.jsonl"
        _write(source, _JOBS, start=number * _JOBS)
        missed = await _run(system, source, namespace=_NAMESPACE, expected="generated")
        # More answers than memory keeps have passed since, so it has none of the first any more.
        found = await _found(system, database, folder, number)
        run = StoreRun(
            stored=size,
            look_up_ms=looked_up,
            missed_rate=_JOBS / missed,
            found_rate=_JOBS / found,
        )
        say(f"{size} stored: look-up {looked_up:.2f} ms, {run.missed_rate:.0f} rows/s missed, "
            f"{run.found_rate:.0f} found")  # fmt: skip
        yield run


async def _fill(database: Database, first: int, last: int) -> None:
    answer = stand_in_answer(_NAMESPACE, "filler").completions[0]
    outputs = {
        "completions": [
            {
                "index": 0,
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "finish_reason": "stop",
                "stop_reason": None,
                "cumulative_logprob": None,
                "logprobs": None,
            }
        ]
    }
    fixed = {"namespace": _NAMESPACE, "model": MODEL, "outputs": json.dumps(outputs)}
    step = 50_000
    async with database.connection() as connection:
        for at in range(first, last, step):
            values = {"first": at + 1, "last": min(at + step, last)}
            await connection.execute(_FILL, {**fixed, **values})
        await connection.execute(text("ANALYZE answers"))


async def _looked_up(database: Database) -> float:
    """Return the p50 of an exact look-up, in milliseconds."""
    store = PostgresAnswers(database)
    known = [stand_in_answer(_NAMESPACE, f"looked up {uuid4()}") for _ in range(50)]
    for answer in known:
        await store.put(answer)
    took = []
    for number in range(_LOOKED_UP):
        started = time.perf_counter()
        if await store.get(_NAMESPACE, known[number % 50].fingerprint) is None:
            raise RuntimeError("a stored answer was not found")
        took.append(time.perf_counter() - started)
    return statistics.median(took) * 1e3


async def _found(system: Deployed, database: Database, folder: Path, number: int) -> float:
    """Run a file whose answers are stored, by somebody else than this worker."""
    store = PostgresAnswers(database)
    source = folder / f"found-{number}.jsonl"
    start = 1_000_000 + number * _JOBS
    _write(source, _JOBS, start=start)
    for question in islice(chat_rows.questions(), start, start + _JOBS):
        await store.put(stand_in_answer(_NAMESPACE, question))
    return await _run(system, source, namespace=_NAMESPACE, expected="exact")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the page if that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument("--quick", action="store_true", help="smaller files and stores")
    parser.add_argument("--most-rows", type=int, default=FILES[-1], help="of the longest file")
    parser.add_argument("--docs", type=Path, help="folder to write the table and the plot to")
    options = parser.parse_args(arguments)
    files: tuple[int, ...] = _QUICK_FILES if options.quick else FILES
    files = tuple(rows for rows in files if rows <= options.most_rows)

    def so_far(found: Sizes) -> None:
        if options.docs is not None:
            write_report(options.docs, found)

    with words_on_stderr():
        stored = _QUICK_STORED if options.quick else STORED
        found = asyncio.run(_measure(files, stored, so_far=so_far))
    listed = [*_of_files(found.files), *_of_stores(found.stores)]
    if options.json:
        print(json.dumps({figure.name: figure.value for figure in listed}))
        return
    for figure in listed:
        print(f"{figure.name:36} {figure.value:12.4g} {figure.unit}")


if __name__ == "__main__":
    main()
