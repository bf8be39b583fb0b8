"""`RequestScope`: what vLLM's own signature has no place for, carried in a context variable.

vLLM's OpenAI handlers call the engine with vLLM's arguments only, and drop our metadata. A caller
that needs a namespace, a reuse policy or the provenance therefore enters a scope around the call:

    scope = RequestScope(namespace="acme", reuse=Reuse.SEMANTIC)
    with scope.active():
        response = await handler(request)
    scope.report.metadata["provenance"]
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from schema.jobs import Reuse, Verify
from schema.names import DEFAULT_NAMESPACE
from workers.engine.config import ReusePolicy
from workers.engine.protocols import Decision, StoredAnswer

_LEFT_OPEN = ("reuse", "threshold", "ttl_s", "sliding_ttl", "shadow", "verify")

_current: ContextVar[RequestScope | None] = ContextVar("promptmill_scope", default=None)


@dataclass(frozen=True, kw_only=True)
class ReportEntry:
    """How one engine request of the scope was answered."""

    request_id: str
    metadata: dict[str, Any]  # as in EnhancedRequestOutput.metadata
    answer: StoredAnswer | None  # the answer given, when it may be stored or was
    stored: bool  # it came out of a durable tier, so nothing is to be written


@dataclass
class RequestReport:
    """What the engine says of the requests made under one scope. Filled as they finish."""

    entries: list[ReportEntry] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the first request; empty before it has finished."""
        return self.entries[0].metadata if self.entries else {}


@dataclass(frozen=True, kw_only=True)
class RequestScope:
    """How the requests made inside are to be treated.

    One scope serves one logical request: its report is filled by every engine call inside.
    """

    namespace: str = DEFAULT_NAMESPACE  # tenant; nothing stored crosses it
    reuse: Reuse | None = None  # None, here and below, is as configured for the namespace
    #: What is analysed and compared. None is the prompt's own text; of a rendered chat its last
    #: turn, and what stands around that must be equal.
    text: str | None = None
    context: bytes = b""  # digest of what must be equal for reuse by meaning (earlier turns, …)
    threshold: float | None = None  # cosine for reuse by meaning
    ttl_s: float | None = None  # seconds the answer stays reusable
    sliding_ttl: bool | None = None  # whether a hit starts the answer's time anew
    shadow: bool | None = None  # whether to decide on reuse by meaning, and yet generate
    verify: Verify | None = None  # who has the last word on a neighbour
    tags: tuple[str, ...] = ()
    job_id: UUID | None = None
    analyse_answer: bool = False
    trace_headers: Mapping[str, str] | None = None  # what vLLM's spans belong to (W3C)
    deferred: bool = False  # whoever opened the scope stores the answers; the engine does not
    #: Whether they will be, where that is still to be found out: what comes late waits for it.
    verdict: asyncio.Future[bool] | None = field(default=None, compare=False, repr=False)
    report: RequestReport = field(default_factory=RequestReport, compare=False, repr=False)

    def under(self, policy: ReusePolicy) -> RequestScope:
        """Return this scope with what it leaves open filled in; its report stays the same.

        Args:
            policy: Of its namespace.
        """
        return dataclasses.replace(
            self,
            **{name: getattr(policy, name) for name in _LEFT_OPEN if getattr(self, name) is None},
        )

    async def accepted(self) -> bool:
        """Whether answers may be stored, once that is known."""
        if self.verdict is None:
            return True
        await asyncio.wait([self.verdict])  # others wait for it too: it must not be cancelled
        return self.verdict.result()

    @contextlib.contextmanager
    def active(self) -> Iterator[RequestScope]:
        """Make this the scope of every engine call inside the ``with`` block."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)


def current_scope() -> RequestScope | None:
    """Return the scope this code runs in, or None."""
    return _current.get()
