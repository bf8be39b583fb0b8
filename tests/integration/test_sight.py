"""What can be seen of jobs, run or repeated: spans, log lines, counts. The engine is a stand-in."""

from __future__ import annotations

import gc
import io
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import orjson
import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider, sampling
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from schema.jobs import JobSpec
from schema.wire import JobMessage
from tests.benchmarks.stand_in import StandIn
from tests.integration.builders import change, spec
from workers import logs, series
from workers.endpoints import Endpoints
from workers.pipeline import Pipeline
from workers.runtime import worker_runtime
from workers.serving import ServedModel
from workers.settings import load_settings
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.tracing import Tracing

if TYPE_CHECKING:
    from workers.observation import Observation

MODEL = f"m{uuid4().hex}"
SECRET = "what nobody may read"
STEPS = ["wait", "answer", "commit", "publish"]


class Engine(StandIn):
    """The stand-in; some prompts break it, in words that quote them."""

    async def generate(self, prompt: str, params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yield the one answer, or fail."""
        if "refuse" in prompt:
            raise ValueError(f"cannot answer {prompt!r}")
        if "break" in prompt:
            raise RuntimeError(f"cannot answer {prompt!r}")
        async for output in super().generate(prompt, params, request_id):
            yield output


class Worker:
    """A worker in this process."""

    def __init__(self, pipeline: Pipeline, store: JobStore) -> None:
        self.pipeline = pipeline
        self._store = store
        self._tracing = Tracing.start(load_settings())

    async def run(self, *prompts: str, before: Any = None, **options: Any) -> list[UUID]:
        """Submit jobs in one message, as a client does, and run it."""
        jobs: list[JobSpec] = [spec(f"{SECRET}: {prompt}", **options) for prompt in prompts]
        with self._tracing.span("submit", kind="producer", jobs=len(jobs)):
            traceparent = self._tracing.traceparent()
            ids = [job.id for job in jobs]
            await self._store.admit(
                jobs, default_model=MODEL, sent=True, max_attempts=2, traceparent=traceparent
            )
        if before is not None:
            await before(ids)
        message = JobMessage(ids=tuple(ids), namespace="default", sent_at=0.0)
        await self.pipeline.run_message(message)
        return ids


@pytest.fixture(autouse=True)
def _melt() -> Iterator[None]:
    """A worker freezes what it has loaded; the tests go on."""
    yield
    gc.unfreeze()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Takes the spans of this test. A process has one provider for life: it is only lent."""
    return lend(monkeypatch, sampling.ALWAYS_ON)


def lend(monkeypatch: pytest.MonkeyPatch, sampler: sampling.Sampler) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Every line that is logged, as JSON; all levels."""
    root, kept = logging.getLogger(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    written = io.StringIO()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(sys, "stderr", written)
        logs.configure(level="DEBUG", form="json")

    def read() -> list[dict[str, Any]]:
        assert SECRET not in written.getvalue()
        return [orjson.loads(line) for line in written.getvalue().splitlines()]

    yield read
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**kept)


@pytest.fixture
async def worker(
    own_redis_url: str,
    database_url: str,
    database: Database,
    job_store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Any]:
    """Starts a worker on this test's database; without recovery, which might end a job first."""
    monkeypatch.setattr("workers.recovery.Recovery.start", lambda _: None)
    endpoints = Endpoints(redis_url=own_redis_url, database_url=database_url)
    async with AsyncExitStack() as running:

        async def start_engine(
            _settings: Any, _model: Any, answers: Any, _stack: Any
        ) -> tuple[Any, Any]:
            return Engine(answers), None

        async def start() -> Worker:
            pipeline = await running.enter_async_context(
                worker_runtime(
                    load_settings(metrics_port=0),
                    endpoints,
                    ServedModel(name=MODEL, path=MODEL),
                    start_engine=start_engine,
                )
            )
            return Worker(pipeline, job_store)

        yield start


def spans_by_job(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """The spans below each job's own, which comes first, in the order in which they began."""
    spans = exporter.get_finished_spans()
    assert not [span for span in spans if SECRET in span.to_json()]
    found = {}
    for span in spans:
        if span.name == "job":
            below = [one for one in spans if one.parent and one.parent.span_id == span_id(span)]
            below.sort(key=lambda one: (one.start_time, one.end_time))
            found[str((span.attributes or {})["promptmill.job_id"])] = [span, *below]
    return found


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


async def test_a_repeat_has_the_spans_of_a_job_that_ran(
    worker: Any, exporter: InMemorySpanExporter
) -> None:
    one = await worker()
    (first,) = await one.run("again")
    repeats = await one.run(*["again"] * 3)
    found = spans_by_job(exporter)
    submits = [span for span in exporter.get_finished_spans() if span.name == "submit"]
    for job_id, submit in [(first, submits[0]), *((repeat, submits[1]) for repeat in repeats)]:
        job, *below = found[str(job_id)]
        assert [span.name for span in below] == STEPS
        assert job.parent is not None
        assert job.parent.span_id == span_id(submit)
        # One after the other, and all of it within the job's own.
        times = [at for span in below for at in (span.start_time or 0, span.end_time or 0)]
        assert times == sorted(times)
        assert job.start_time == times[0]
        assert (job.end_time or 0) >= (times[-1] or 0)
        answered = (below[1].attributes or {})["promptmill.provenance"]
        assert answered == ("generated" if job_id == first else "exact")


async def test_spans_of_a_repeat_say_that_it_went_wrong(
    worker: Any, exporter: InMemorySpanExporter, database: Database
) -> None:
    one = await worker()
    await one.run("again")
    taken: list[UUID] = []
    commit = one.pipeline._commit_group.finish_all

    async def after_another_took_it(outcomes: Any) -> Any:
        taken.append(outcomes[0].job_id)
        statement = "UPDATE jobs SET token = token + 1 WHERE id = :id"
        await change(database, statement, id=taken[0])
        return await commit(outcomes)

    one.pipeline._commit_group.finish_all = after_another_took_it
    _, kept = sorted(await one.run("again", "again"), key=lambda job_id: job_id not in taken)
    found = spans_by_job(exporter)
    _, *below = found[str(taken[0])]
    assert [span.name for span in below] == STEPS[:-1]
    assert [span.status.is_ok for span in below] == [True, True, False]
    _, *below = found[str(kept)]
    assert [span.name for span in below] == STEPS
    assert all(span.status.is_ok for span in below)


async def test_what_was_not_sampled_makes_no_spans(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = lend(monkeypatch, sampling.ALWAYS_OFF)
    one = await worker()
    for _ in range(2):
        await one.run("again")
    assert not exporter.get_finished_spans()


async def test_lines_bear_job_and_trace_and_never_the_prompt(
    lines: Any, worker: Any, exporter: InMemorySpanExporter, database: Database
) -> None:
    one = await worker()
    submitted = [*await one.run("answer"), *await one.run("answer")]
    submitted += [*await one.run("refuse"), *await one.run("break")]

    async def let_pass(ids: list[UUID]) -> None:
        statement = "UPDATE jobs SET deadline_at = now() - interval '1 second' WHERE id = :id"
        await change(database, statement, id=ids[0])

    (late,) = await one.run("late", before=let_pass)
    said = lines()
    traces = {
        job_id: f"{job.context.trace_id:032x}"
        for job_id, (job, *_) in spans_by_job(exporter).items()
        if job.context is not None
    }
    about = [line for line in said if "job_id" in line]
    told = [
        (line["job_id"], line["event"], line.get("state") or line.get("error")) for line in about
    ]
    run, again, refused, broken = map(str, submitted)
    assert told == [
        (run, "job ended", "done"),
        (again, "job ended", "done"),
        (refused, "job ended", "failed"),
        (broken, "job failed in a way nobody foresaw", "RuntimeError"),
        (broken, "attempt failed; the job is tried again", "RuntimeError"),
        (str(late), "job ended", "expired"),
    ]
    # One that never ran here has no span to name; all others name their own.
    assert [line.get("trace_id") for line in about[:-1]] == [
        traces[line["job_id"]] for line in about[:-1]
    ]
    assert [line["provenance"] for line in about[:2]] == ["generated", "exact"]
    assert {line["level"] for line in about} == {"debug", "info", "error"}
    assert all({"timestamp", "logger"} <= line.keys() for line in about)


async def test_repeats_and_jobs_that_never_ran_are_counted(
    worker: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers import observation

    made: list[Observation] = []
    build = observation.Observation.__init__

    def remember(self: Observation, *args: Any, **words: Any) -> None:
        build(self, *args, **words)
        made.append(self)

    monkeypatch.setattr(observation.Observation, "__init__", remember)
    one = await worker()
    await one.run("again")
    await one.run(*["again"] * 5)

    async def let_pass(ids: list[UUID]) -> None:
        statement = "UPDATE jobs SET deadline_at = now() - interval '1 second' WHERE id = :id"
        await change(database, statement, id=ids[0])

    await one.run("late", before=let_pass)
    ((metrics),) = (seen.metrics for seen in made)

    def value(name: str, **labels: str) -> float | None:
        read: float | None = metrics.registry.get_sample_value(name, {"model": MODEL, **labels})
        return read

    assert value(series.JOBS.name, state="done", provenance="generated") == 1
    assert value(series.JOBS.name, state="done", provenance="exact") == 5
    assert value(series.JOBS.name, state="expired", provenance="none") == 1
    assert value(f"{series.JOB_WAIT.name}_count") == 6
    assert value(f"{series.JOB_RUN.name}_count", provenance="exact") == 5
    generated = value(series.JOB_TOKENS.name, source="generated") or 0
    assert generated > 0
    assert value(series.JOB_TOKENS.name, source="reused") == 5 * generated
    assert metrics.ended_by_state == {"done": 6, "expired": 1}
    assert metrics.tokens == 6 * generated
