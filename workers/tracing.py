"""`Tracing`: one trace from submission to publication, by OpenTelemetry.

The submission's span is carried in the job's row (and in its message, where there is no database)
as a W3C ``traceparent``, so that whatever a worker does for the job belongs to the same trace, and
so does vLLM's own span of the request. Off, which is the default, it costs nothing: OpenTelemetry
is not even imported. Spans carry ids, names and numbers, never a prompt or an answer.

``OTEL_*`` variables hold as everywhere: service name, sampler, headers, limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from schema.errors import ConfigurationError
from workers import otlp

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from workers.settings import Settings
    from workers.store.records import Outcome

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_FLUSH_MS = 5_000
_NAME = "promptmill"
#: Whether the job that this code runs for is traced; None outside of jobs.
_traced: ContextVar[bool | None] = ContextVar("promptmill_traced", default=None)


class Tracing:
    """Makes spans, or nothing when it is off.

    Args:
        tracer: OpenTelemetry's; None switches tracing off.
    """

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer

    @classmethod
    def start(cls, settings: Settings) -> Self:
        """Trace to the collector that the settings name; off where they name none.

        A program that traces already keeps its own provider, and its spans are joined.

        Args:
            settings: Read from the environment.

        Raises:
            ConfigurationError: OpenTelemetry is not installed, or the address cannot be used.
        """
        if settings.otlp_endpoint is None:
            # A program that has not imported OpenTelemetry has no span to go on from.
            if "opentelemetry.sdk.trace" not in sys.modules or not otlp.provided():
                return cls()
        else:
            try:
                if not otlp.provided():
                    otlp.provide(settings.otlp_endpoint)
            except ImportError as exc:
                msg = "tracing needs OpenTelemetry: pip install 'promptmill[tracing]'"
                raise ConfigurationError(msg) from exc
        from opentelemetry import trace

        return cls(trace.get_tracer(_NAME))

    @property
    def on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    def wants(self, traceparent: str | None) -> bool:
        """Say whether a job's spans are made.

        Args:
            traceparent: Of the submission. One that was not sampled makes no spans.
        """
        return self._tracer is not None and _sampled(traceparent)

    def span(
        self, name: str, *, kind: str = "internal", **attributes: Any
    ) -> AbstractContextManager[Any]:
        """Make a span around a block, below the current one.

        Work for no job, or for one whose submission was not sampled, makes none; a submission
        begins a trace or goes on with that of its caller.

        Args:
            name: Low in number: no ids.
            kind: ``internal``, ``producer`` or ``consumer``.
            attributes: Ids and numbers; those that are None are left out.
        """
        if self._tracer is None or not (_traced.get() or kind == "producer"):
            return contextlib.nullcontext()
        return self._span(name, None, kind, None, attributes)

    def job(
        self, traceparent: str | None, *, waited_since: float, **attributes: Any
    ) -> AbstractContextManager[Any]:
        """Make the span of a job on its worker, and one for the time it waited.

        Args:
            traceparent: Of the submission. One that was not sampled makes no spans.
            waited_since: When it was submitted; Unix time.
            attributes: Of the job's span.
        """
        if self._tracer is None:
            return contextlib.nullcontext()
        if not _sampled(traceparent):
            return _noted(traced=False)
        return self._job(traceparent, waited_since, attributes)

    def settled(
        self,
        traceparent: str | None,
        outcome: Outcome,
        *,
        waited_since: float,
        ends: Sequence[tuple[str, float]],
        failed_at: str | None,
        **attributes: Any,
    ) -> None:
        """Make the spans of a job that was answered without a run, when it is over.

        Its steps were taken together with those of other jobs, and are as long as theirs.

        Args:
            traceparent: Of the submission; wanted.
            outcome: What it was answered.
            waited_since: When it was submitted; Unix time.
            ends: Its steps, each with the Unix time at which it ended and the next began.
            failed_at: The step that failed, if one did.
            attributes: Of the job's span.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        began_ns = int(waited_since * 1e9)
        job = self._tracer.start_span(
            "job",
            context=_context(traceparent),
            kind=SpanKind.CONSUMER,
            start_time=began_ns,
            attributes=_named(attributes),
        )
        ended_ns = int(ends[-1][1] * 1e9)
        if job.is_recording():
            below = set_span_in_context(job)
            for name, ended_s in ends:
                span = self._tracer.start_span(name, context=below, start_time=began_ns)
                if name == "answer":
                    describe_answer(span, outcome, stages=False)
                if name == failed_at:
                    span.set_status(Status(StatusCode.ERROR))
                began_ns = int(ended_s * 1e9)
                span.end(began_ns)
        job.end(ended_ns)

    def traceparent(self) -> str | None:
        """Return the current span as a W3C header, or None."""
        if self._tracer is None:
            return None
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier.get("traceparent")

    def headers(self, traceparent: str | None) -> dict[str, str] | None:
        """Return what vLLM is to attach its spans to.

        Args:
            traceparent: Of the submission, for one that was not sampled: its request must not
                begin a trace of its own.
        """
        if self._tracer is None:
            return None
        current = self.traceparent() if _traced.get() else traceparent
        return {"traceparent": current} if current else None

    async def aclose(self) -> None:
        """Send what has gathered, for some seconds at most."""
        if self._tracer is None:
            return
        from opentelemetry import trace

        flush = getattr(trace.get_tracer_provider(), "force_flush", None)
        if flush is not None:
            await asyncio.to_thread(flush, _FLUSH_MS)

    @contextlib.contextmanager
    def _job(
        self, traceparent: str | None, waited_since: float, attributes: Mapping[str, Any]
    ) -> Iterator[Any]:
        parent = _context(traceparent)
        start_ns = int(waited_since * 1e9)
        with (
            _noted(traced=True),
            self._span("job", parent, "consumer", start_ns, attributes) as span,
        ):
            waited = self._tracer.start_span("wait", start_time=start_ns)
            waited.end(time.time_ns())
            yield span

    @contextlib.contextmanager
    def _span(
        self,
        name: str,
        context: Any,
        kind: str,
        start_ns: int | None,
        attributes: Mapping[str, Any],
    ) -> Iterator[Any]:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=SpanKind[kind.upper()],
            start_time=start_ns,
            attributes=_named(attributes),
            # The text of an error may quote the prompt; its class does not.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as exc:
                span.set_status(Status(StatusCode.ERROR, type(exc).__name__))
                raise


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace that a W3C header names, as 32 hexadecimal digits.

    Args:
        traceparent: As it came; None and nonsense give None.
    """
    match = _TRACEPARENT.fullmatch(traceparent or "")
    return match[1] if match else None


def describe_answer(span: Any, outcome: Outcome, *, stages: bool = True) -> None:
    """Write on a span how an answer came about; numbers and names alone.

    Args:
        span: Of OpenTelemetry.
        outcome: Of the job.
        stages: Whether the seconds of its stages are this job's own.
    """
    metadata = outcome.result.metadata
    span.set_attribute(f"{_NAME}.status", outcome.result.status.value)
    for name in ("provenance", "tier", "similarity"):
        if (value := metadata.get(name)) is not None:
            span.set_attribute(f"{_NAME}.{name}", value)
    times = metadata.get("processing_time", {}) if stages else {}
    for stage, seconds in times.items():
        span.set_attribute(f"{_NAME}.stage.{stage}_s", seconds)
    for part in metadata.get("errors", {}):
        span.add_event("enhancement failed", {f"{_NAME}.part": part})


@contextlib.contextmanager
def _noted(*, traced: bool) -> Iterator[None]:
    token = _traced.set(traced)
    try:
        yield None
    finally:
        _traced.reset(token)


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{_NAME}.{key}": value for key, value in attributes.items() if value is not None}


def _context(traceparent: str | None) -> Any:
    """Return what a submission's span is to OpenTelemetry; None without one."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if traceparent is None:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _sampled(traceparent: str | None) -> bool:
    match = _TRACEPARENT.fullmatch(traceparent or "")
    return match is None or bool(int(match[3], 16) & 1)
