"""`Display`: shows what jobs ask for in the log and in ``celery inspect``, where that was wished.

Prompts are other people's words: unless a worker is told otherwise they are seen in neither.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from workers.store.records import ClaimedJob

_log = structlog.get_logger(__name__)


class Display:
    """What one worker shows of the jobs it runs.

    Args:
        on: Whether anything is shown.
    """

    def __init__(self, *, on: bool) -> None:
        self._on = on
        self._running: dict[str, dict[str, Any]] = {}

    def claimed(self, job: ClaimedJob) -> None:
        """Write to the log what a job asks for.

        Args:
            job: Claimed a moment ago.
        """
        if self._on:
            _log.info("job claimed", job_id=str(job.id), request=job.request)

    @contextmanager
    def running(self, job: ClaimedJob) -> Iterator[None]:
        """Let a job be seen by those who inspect the worker while the block runs.

        Args:
            job: It is about to be run.
        """
        if self._on:
            self._running[str(job.id)] = job.request
        try:
            yield
        finally:
            self._running.pop(str(job.id), None)

    def requests(self, ids: Iterable[object]) -> dict[str, dict[str, Any]]:
        """Return what jobs that run here ask for, by id. May be called in any thread.

        Args:
            ids: Of jobs, or of none.
        """
        found = {str(job_id): self._running.get(str(job_id)) for job_id in ids}
        return {job_id: request for job_id, request in found.items() if request is not None}
