"""``promptmill doctor``: looks at everything a deployment rests on, and says what to mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError, PromptmillError
from workers.doctor.findings import Check, Severity, error, ok, skipped, warning, worst

if TYPE_CHECKING:
    from workers.endpoints import Endpoints
    from workers.settings import Settings

__all__ = ["Check", "Severity", "examine", "worst"]


def examine(**overrides: object) -> Iterator[Check]:
    """Look at the machine, the model and the servers; the embedded servers are started for it.

    Args:
        overrides: Settings that the caller decides, over the environment; None leaves one alone.

    Yields:
        Findings, each as soon as it is known.
    """
    from workers.settings import load_settings

    try:
        settings = load_settings(**overrides)
    except ConfigurationError as exc:
        yield error("settings", str(exc), "mend the variable; `promptmill config show` shows all")
        return
    from workers.doctor import machine, model

    for check in machine.CHECKS:
        yield from _guarded(check.__name__.replace("_", " "), partial(check, settings))
    yield from _guarded("model", lambda: model.examine(settings))
    yield from _servers(settings)


def _servers(settings: Settings) -> Iterator[Check]:
    from workers import endpoints

    try:
        found = endpoints.find(settings)
    except PromptmillError as exc:
        yield error("servers", str(exc), "do what it says; nothing works without the servers")
        return
    try:
        yield ok("servers", "the embedded ones" if found.embedded else "those that are named")
        yield from _named(found)
    finally:
        found.close()


def _named(found: Endpoints) -> Iterator[Check]:
    from workers.doctor import broker, database

    url = found.database_url
    if url is None:
        yield skipped("postgres", "PROMPTMILL_DATABASE_URL is unset: a producer with Redis alone")
    else:
        yield from _guarded("postgres", lambda: database.examine(url))
    yield from _guarded("redis", lambda: broker.examine(found.redis_url))
    yield from _guarded("workers", lambda: _workers(found))


def _workers(found: Endpoints) -> Iterator[Check]:
    """Does somebody answer what waits?"""
    from workers.doctor import broker, database

    served = broker.models_at_work(found.redis_url)
    if served is None:
        yield skipped("workers", "Redis cannot be asked")
        return
    waiting = database.waiting_jobs(found.database_url) if found.database_url else {}
    stranded = {model: jobs for model, jobs in waiting.items() if model not in served}
    for model, jobs in sorted(stranded.items()):
        remedy = f"start a worker for it (`promptmill up --model …`), or cancel them: {model}"
        yield warning("workers", f"{jobs} jobs wait for {model}, which no worker serves", remedy)
    if not stranded:
        yield ok("workers", f"serving {', '.join(sorted(served)) or 'nothing: none runs now'}")


def _guarded(name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Let no check that fails end the others."""
    try:
        yield from look()
    except PromptmillError as exc:
        yield error(name, str(exc), "do what it says")
    except Exception as exc:  # noqa: BLE001  whatever it was, it is told, and the rest is looked at
        found = f"could not be looked at ({type(exc).__name__}: {exc})"
        yield error(name, found, "`promptmill --debug doctor` shows where; this is a fault of ours")
