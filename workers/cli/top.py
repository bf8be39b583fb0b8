"""``promptmill top``: a deployment, live."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schema.errors import ConfigurationError
from workers.cli.shared import Json, Namespace, job_rows, print_json, settings_with, table

if TYPE_CHECKING:
    from workers.overview import Overview, WorkerView
    from workers.settings import Settings

# What matters most comes first: a narrow terminal shows so much of it.
WORKERS = (
    *("worker", "device", "jobs", "jobs/s", "tokens/s", "reused", "memory", "lag", "ended"),
    "models",
)
QUEUES = ("model", "queued", "running", "oldest")


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The root.
    """
    app.command()(top)


def top(
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and end.")] = False,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Watch workers, devices, queues, rates, slow and failed jobs.

    Keys: arrows choose a job, enter looks into it, c cancels it, r runs it once more, q ends.
    """
    import sys

    settings = settings_with()
    if not once and not as_json and sys.stdout.isatty():
        _watch(settings, every, namespace)
        return
    seen = asyncio.run(_look(settings, namespace))
    if as_json:
        print_json(seen.public())
        return
    print(summary(seen))
    table(WORKERS, worker_rows(seen))
    table(QUEUES, queue_rows(seen))
    job_rows((*seen.slow, *seen.failed))


def worker_rows(seen: Overview) -> list[tuple[str, ...]]:
    """Return a line for each worker, under `WORKERS`."""
    return [
        (
            _place(worker),
            worker.device,
            f"{worker.running}/{worker.slots}",
            _rate(worker.jobs_per_s),
            _rate(worker.tokens_per_s),
            _share(worker.reused),
            f"{worker.memory_bytes / 1e9:.1f} GB",
            f"{worker.lag_s * 1000:.0f} ms",
            str(worker.ended),
            ", ".join(worker.models),
        )
        for worker in seen.workers
    ]


def queue_rows(seen: Overview) -> list[tuple[str, ...]]:
    """Return a line for each queue, under `QUEUES`."""
    return [
        (queue.model, str(queue.queued), str(queue.running), f"{queue.oldest_s:.0f} s")
        for queue in seen.queues
    ]


def summary(seen: Overview) -> str:
    """Return one line on all workers together."""
    workers = seen.workers
    told = [
        f"{seen.at:%H:%M:%S} UTC",
        f"{len(workers)} worker{'s' * (len(workers) != 1)}",
        f"{sum(one.running for one in workers)} of {sum(one.slots for one in workers)} slots",
    ]
    if any(one.jobs_per_s is not None for one in workers):
        told.append(f"{sum(one.jobs_per_s or 0 for one in workers):.1f} jobs/s")
        told.append(f"{sum(one.tokens_per_s or 0 for one in workers):.0f} tokens/s")
    answers = seen.answers
    kinds = [kind for kind in ("exact", "semantic", "coalesced") if answers[kind]]
    shares = ", ".join(f"{kind} {_share(answers[kind] / answers.total())}" for kind in kinds)
    if seen.reused is not None:
        told.append(f"reused {_share(seen.reused)}" + (f" ({shares})" if shares else ""))
    return "   ".join(told)


def _place(worker: WorkerView) -> str:
    """Return what tells a worker from the others of its device: its host, and its process."""
    host, _, process = worker.name.rpartition("@")[2].rpartition(f":{worker.device}:")
    return f"{host}:{process}" if host else worker.name


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


async def _look(settings: Settings, namespace: str | None) -> Overview:
    from workers.aio_client import AsyncJobClient
    from workers.overview import Watcher

    async with AsyncJobClient(settings) as client:
        return await Watcher(client, namespace=namespace).look()


def _watch(settings: Settings, every_s: float, namespace: str | None) -> None:
    try:
        from workers.cli.top_view import TopView
    except ImportError as exc:
        msg = "the live view needs textual: pip install 'promptmill[top]', or give --once"
        raise ConfigurationError(msg) from exc
    from workers.aio_client import AsyncJobClient

    async def run() -> Any:
        async with AsyncJobClient(settings) as client:
            await TopView(client, every_s=every_s, namespace=namespace).run_async()

    asyncio.run(run())
