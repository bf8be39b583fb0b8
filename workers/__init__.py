"""promptmill: submit prompts to a queue, have them answered by vLLM, read the answers back.

Names are imported when they are first used, so that a producer pays for the client alone: no vLLM,
no torch, no spaCy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.aio_client import AsyncJobClient
    from workers.client import JobClient
    from workers.jobs import AsyncJob, Job
    from workers.settings import Settings, load_settings

_WHERE = {
    # Submitting
    "JobClient": "workers.client",
    "AsyncJobClient": "workers.aio_client",
    "Job": "workers.jobs",
    "AsyncJob": "workers.jobs",
    # Settings
    "Settings": "workers.settings",
    "load_settings": "workers.settings",
}

__all__ = ["AsyncJob", "AsyncJobClient", "Job", "JobClient", "Settings", "load_settings"]


def __getattr__(name: str) -> Any:
    # PEP 562: called once a name, because the result is kept.
    if name not in _WHERE:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
