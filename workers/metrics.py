"""`WorkerMetrics`: what one worker counts, and what it exports to Prometheus.

What happens to jobs is counted as it happens, in plain numbers: a job from the cache takes a tenth
of a millisecond, of which a client library's own counters would be a twentieth. All else is read
from where it is counted already when Prometheus asks, so that a worker nobody scrapes pays nothing.
Each worker process exports its own registry, joined with the process-wide one that vLLM registers
its series in; nothing is shared between processes, so several workers on a host need no common
folder.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from schema.jobs import JobState
from workers import series
from workers.engine.stats import STAGE_BUCKETS_S, StageTimes

if TYPE_CHECKING:
    from schema.jobs import JobResult
    from workers.backlog import Backlog
    from workers.series import Series
    from workers.store.records import ClaimedJob, Outcome

_REUSED = frozenset({"exact", "semantic", "coalesced"})


class Meter(Protocol):
    """What the pipeline tells of its jobs."""

    def claimed(self, job: ClaimedJob) -> None:
        """A job was claimed."""

    def ended(self, job: ClaimedJob, outcome: Outcome) -> None:
        """An outcome was committed."""

    def ended_unrun(self, result: JobResult) -> None:
        """A job was over when it was to be claimed: cancelled, expired or set aside."""

    def passed_over(self, job: ClaimedJob) -> None:
        """A job that was to be ended without a claim was no longer free, and a claim follows."""

    def put_back(self, job: ClaimedJob) -> None:
        """An attempt failed, and the job will be tried again."""

    def returned(self, job: ClaimedJob, reason: str) -> None:
        """This worker gave a job up: stopping, engine-died or lease-lost."""


@dataclass(kw_only=True)
class Sample:
    """What is read when Prometheus asks."""

    engine: Mapping[str, Any] = field(default_factory=dict)  # as `EnhancedAsyncLLM.stats`
    running: int = 0
    slots: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)  # bytes by kind of process
    lag_classes: Sequence[int] = ()
    lag_sum_s: float = 0.0
    backlog: Backlog | None = None
    workers: Mapping[str, int] = field(default_factory=dict)  # living ones, by model
    dead_messages: int | None = None


class WorkerMetrics:
    """Counts, and exports what is counted elsewhere; implements `Meter`.

    Args:
        model: Served name.
        info: Labels of `series.WORKER` beside the model.
    """

    def __init__(self, *, model: str, info: Mapping[str, str]) -> None:
        self.registry = CollectorRegistry()
        self.sample = Sample()
        self._model = model
        self._info = {"model": model, **info}
        self._jobs: Counter[tuple[str, str]] = Counter()  # by state and provenance
        self._wait = StageTimes(bounds=series.JOB_BUCKETS_S)
        self._run: dict[str, StageTimes] = {}  # by provenance
        self._tokens: Counter[str] = Counter()  # by source
        self._retries = 0
        self._returned: Counter[str] = Counter()  # by reason
        self._recovered: Counter[str] = Counter()  # by action
        self._claimed_at: dict[tuple[Any, int], float] = {}
        self.registry.register(_Sampled(self))
        self.registry.register(_ProcessWide())

    @property
    def ended_by_state(self) -> dict[str, int]:
        """Jobs that ended on this worker."""
        found: Counter[str] = Counter()
        for (state, _how), jobs in list(self._jobs.items()):
            found[state] += jobs
        return dict(found)

    @property
    def tokens(self) -> int:
        """Tokens of the answers given."""
        return self._tokens.total()

    def claimed(self, job: ClaimedJob) -> None:
        """Count how long a job waited."""
        now = time.time()
        self._claimed_at[job.id, job.token] = now
        self._wait.add(max(now - job.created_at.timestamp(), 0.0))

    def ended(self, job: ClaimedJob, outcome: Outcome) -> None:
        """Count an outcome that was committed."""
        status = outcome.result.status
        how = "none" if outcome.provenance is None else outcome.provenance.value
        self._jobs[status.value, how] += 1
        began = self._claimed_at.pop((job.id, job.token), None)
        if began is not None:
            took = self._run.get(how)
            if took is None:
                took = self._run[how] = StageTimes(bounds=series.JOB_BUCKETS_S)
            took.add(max(time.time() - began, 0.0))
        if status is JobState.DONE and (tokens := _tokens(outcome)):
            self._tokens["reused" if how in _REUSED else "generated"] += tokens

    def ended_unrun(self, result: JobResult) -> None:
        """Count a job that was over when it was to be claimed."""
        self._jobs[result.status.value, "none"] += 1

    def passed_over(self, job: ClaimedJob) -> None:
        """Count nothing: others have it, or it is claimed next."""
        self._claimed_at.pop((job.id, job.token), None)

    def put_back(self, job: ClaimedJob) -> None:
        """Count an attempt that failed."""
        self._claimed_at.pop((job.id, job.token), None)
        self._retries += 1

    def returned(self, job: ClaimedJob, reason: str) -> None:
        """Count a job that this worker gave up."""
        self._claimed_at.pop((job.id, job.token), None)
        self._returned[reason] += 1

    def recovered(self, by_action: Mapping[str, int]) -> None:
        """Count what a pass of recovery put right.

        Args:
            by_action: Jobs by `workers.recovery.Recovered`'s field.
        """
        self._recovered.update(by_action)

    def sampled(self) -> Iterator[Metric]:
        """Yield the series that are read when Prometheus asks."""
        sample, model = self.sample, self._model
        yield _info(series.WORKER, self._info)
        yield from self._of_jobs()
        yield _family(series.JOBS_RUNNING, [((model,), sample.running)])
        yield _family(series.JOB_SLOTS, [((model,), sample.slots)])
        yield from _of_engine(sample.engine)
        yield _family(series.RESIDENT, _one(sample.memory))
        yield _histogram(
            series.LOOP_LAG,
            series.LAG_BUCKETS_S,
            [((), sample.lag_classes or [0], sample.lag_sum_s)],
        )
        yield from _of_deployment(sample)

    def _of_jobs(self) -> Iterator[Metric]:
        # Another thread asks: what is read is a copy, made in one step.
        model, recovered = self._model, dict(self._recovered)
        yield _family(series.JOBS, [((model, *of), n) for of, n in list(self._jobs.items())])
        yield _times(series.JOB_WAIT, {(model,): self._wait})
        yield _times(series.JOB_RUN, {(model, how): took for how, took in list(self._run.items())})
        tokens, returned = list(self._tokens.items()), list(self._returned.items())
        yield _family(series.JOB_TOKENS, [((model, source), n) for source, n in tokens])
        yield _family(series.JOB_RETRIES, [((model,), self._retries)])
        yield _family(series.JOBS_RETURNED, [((model, reason), n) for reason, n in returned])
        yield _family(series.LEASES_EXPIRED, [((), recovered.get("requeued", 0))])
        yield _family(series.RECOVERED, _one(recovered))


class _Sampled:
    """Collector of what `WorkerMetrics.sampled` yields."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.sampled()


class _ProcessWide:
    """Collector of the registry that vLLM and Prometheus' own process series are in."""

    def collect(self) -> Iterable[Metric]:
        return REGISTRY.collect()


def _of_engine(engine: Mapping[str, Any]) -> Iterator[Metric]:
    decisions: Mapping[str, int] = engine.get("decisions", {})
    hits: Mapping[str, int] = engine.get("hits", {})
    memory: Mapping[str, int] = engine.get("memory", {})
    yield _family(series.REQUESTS, [((), engine.get("requests", 0))])
    yield _family(series.GENERATIONS, [((), engine.get("generated", 0))])
    yield _family(series.COALESCED, [((), engine.get("coalesced", 0))])
    yield _family(
        series.HITS, [(tuple(reversed(name.split("/"))), count) for name, count in hits.items()]
    )
    yield _family(series.REUSE_SERVED, [((), decisions.get("served", 0))])
    yield _family(
        series.REUSE_REFUSALS,
        [((rule,), count) for rule, count in decisions.items() if rule != "served"],
    )
    yield _family(series.FLIGHTS, [((), engine.get("flights", 0))])
    yield _family(series.MEMORY_ENTRIES, [((), memory.get("entries", 0))])
    yield _family(series.MEMORY_BYTES, [((), memory.get("bytes", 0))])
    stages: Mapping[str, Any] = engine.get("stages", {})
    yield _histogram(
        series.STAGE,
        STAGE_BUCKETS_S,
        [((stage,), took["classes"], took["seconds"]) for stage, took in stages.items()],
    )
    yield _family(series.FAILURES, _one(engine.get("failures", {})))
    yield _family(series.SKIPS, _one(engine.get("left_alone", {})))
    yield _family(series.SIDE_TASKS, [((), engine.get("side_tasks", 0))])


def _of_deployment(sample: Sample) -> Iterator[Metric]:
    backlog = sample.backlog
    if backlog is not None:
        yield _family(
            series.QUEUE_JOBS,
            [((live.model, live.namespace, live.state), live.jobs) for live in backlog.jobs],
        )
        oldest = {**dict.fromkeys(sample.workers, 0.0), **backlog.oldest_s()}
        yield _family(series.QUEUE_OLDEST, _one(oldest))
        yield _family(series.QUEUE_COUNTED, [((), backlog.age_s)])
    yield _family(series.WORKERS, _one(sample.workers))
    if sample.dead_messages is not None:
        yield _family(series.DEAD_MESSAGES, [((), sample.dead_messages)])


def _one(values: Mapping[str, float]) -> list[tuple[tuple[str, ...], float]]:
    return [((name,), value) for name, value in values.items()]


def _family(of: Series, samples: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    make = CounterMetricFamily if of.kind == "counter" else GaugeMetricFamily
    family = make(of.name, of.help, labels=of.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _info(of: Series, labels: Mapping[str, str]) -> Metric:
    family = InfoMetricFamily(of.name.removesuffix("_info"), of.help)
    family.add_metric((), {name: labels.get(name, "") for name in of.labels})
    return family


def _histogram(
    of: Series,
    bounds: Sequence[float],
    samples: Iterable[tuple[tuple[str, ...], Sequence[int], float]],
) -> Metric:
    family = HistogramMetricFamily(of.name, of.help, labels=of.labels)
    for labels, classes, total in samples:
        buckets, so_far = [], 0
        for bound, count in zip((*map(str, map(float, bounds)), "+Inf"), classes, strict=False):
            so_far += count
            buckets.append((bound, float(so_far)))
        if buckets[-1][0] != "+Inf":
            buckets.append(("+Inf", float(so_far)))
        family.add_metric(labels, buckets, total)
    return family


def _times(of: Series, by_labels: Mapping[tuple[str, ...], StageTimes]) -> Metric:
    counted = [(labels, list(took.classes), took.seconds) for labels, took in by_labels.items()]
    return _histogram(of, series.JOB_BUCKETS_S, counted)


def _tokens(outcome: Outcome) -> int:
    """Return how many tokens an answer has."""
    body = outcome.result.body
    if body is not None:
        usage = body.get("usage")
        said = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return said if isinstance(said, int) else 0
    return sum(len(output.token_ids) for output in outcome.result.outputs)
