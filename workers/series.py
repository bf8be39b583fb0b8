"""Every series that a worker exports to Prometheus, by Prometheus' naming conventions.

Base units, the unit in the name, counters end in ``_total``. No label holds a prompt, a job's id or
anything else that grows with use; tenants and models are bounded by `BOUND`. `docs/metrics.md` is
made from this list, and the alert rules and the dashboard are checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Tenants, and models, that have series of their own; the smallest beyond it share one.
BOUND = 20
#: Value of a label for all that share a series.
OTHERS = "~others"

#: Upper bounds in seconds, for waits and runs of jobs.
JOB_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
#: Upper bounds in seconds, of how late the event loop was.
LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One family of series."""

    name: str  # as queried; of a histogram without _bucket, _sum and _count
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    part: Literal["jobs", "reuse", "enrichment", "process", "deployment"]

    @property
    def samples(self) -> tuple[str, ...]:
        """Names that Prometheus stores."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{end}" for end in ("bucket", "sum", "count"))
        return (self.name,)


# What becomes of jobs on this worker.
JOBS = Series(
    part="jobs",
    name="promptmill_jobs_total",
    kind="counter",
    help="Jobs that ended on this worker, by last state and by how the answer came about.",
    labels=("model", "state", "provenance"),
)
JOB_WAIT = Series(
    part="jobs",
    name="promptmill_job_wait_seconds",
    kind="histogram",
    help="Time from submission until this worker claimed the job.",
    labels=("model",),
)
JOB_RUN = Series(
    part="jobs",
    name="promptmill_job_run_seconds",
    kind="histogram",
    help="Time from the claim until the outcome was committed.",
    labels=("model", "provenance"),
)
JOB_TOKENS = Series(
    part="jobs",
    name="promptmill_job_tokens_total",
    kind="counter",
    help="Tokens of the answers given; `source` is generated or reused.",
    labels=("model", "source"),
)
JOB_RETRIES = Series(
    part="jobs",
    name="promptmill_job_retries_total",
    kind="counter",
    help="Attempts that failed and whose job was put back, to be tried again later.",
    labels=("model",),
)
JOBS_RETURNED = Series(
    part="jobs",
    name="promptmill_jobs_returned_total",
    kind="counter",
    help="Jobs this worker gave up: stopping, engine-died, or lease-lost (to another worker).",
    labels=("model", "reason"),
)
JOBS_RUNNING = Series(
    part="jobs",
    name="promptmill_jobs_running",
    kind="gauge",
    help="Jobs in flight on this worker.",
    labels=("model",),
)
JOB_SLOTS = Series(
    part="jobs",
    name="promptmill_job_slots",
    kind="gauge",
    help="Jobs that may be in flight on this worker.",
    labels=("model",),
)
LEASES_EXPIRED = Series(
    part="jobs",
    name="promptmill_leases_expired_total",
    kind="counter",
    help="Jobs taken back from workers whose lease had ended, by the recovery of this worker.",
)
RECOVERED = Series(
    part="jobs",
    name="promptmill_recovered_jobs_total",
    kind="counter",
    help="Jobs that recovery of this worker put right: requeued, ended, sent, sent_again, adopted, "
    "published.",
    labels=("action",),
)

# What was not computed again.
REQUESTS = Series(
    part="reuse",
    name="promptmill_engine_requests_total",
    kind="counter",
    help="Requests made to the engine.",
)
GENERATIONS = Series(
    part="reuse",
    name="promptmill_generations_total",
    kind="counter",
    help="Answers that vLLM generated.",
)
HITS = Series(
    part="reuse",
    name="promptmill_cache_hits_total",
    kind="counter",
    help="Stored answers that were served, by tier (memory, store) and kind (exact, semantic).",
    labels=("tier", "kind"),
)
COALESCED = Series(
    part="reuse",
    name="promptmill_coalesced_total",
    kind="counter",
    help="Requests that shared a generation in flight with an equal one.",
)
REUSE_SERVED = Series(
    part="reuse",
    name="promptmill_reuse_served_total",
    kind="counter",
    help="Neighbours' answers that the guard allowed and that were served.",
)
REUSE_REFUSALS = Series(
    part="reuse",
    name="promptmill_reuse_refusals_total",
    kind="counter",
    help="Neighbours' answers that were not served, by the rule that refused.",
    labels=("rule",),
)
FLIGHTS = Series(
    part="reuse",
    name="promptmill_flights",
    kind="gauge",
    help="Generations under way that equal requests can join.",
)
MEMORY_ENTRIES = Series(
    part="reuse",
    name="promptmill_memory_tier_entries",
    kind="gauge",
    help="Answers in this worker's memory.",
)
MEMORY_BYTES = Series(
    part="reuse",
    name="promptmill_memory_tier_bytes",
    kind="gauge",
    help="Size of the answers in this worker's memory.",
)

# What runs beside generation.
STAGE = Series(
    part="enrichment",
    name="promptmill_stage_seconds",
    kind="histogram",
    help="Time a stage of a request took: looking up, generating, each enrichment; and in total.",
    labels=("stage",),
)
FAILURES = Series(
    part="enrichment",
    name="promptmill_enhancement_failures_total",
    kind="counter",
    help="Calls of a part that failed or ran over their time.",
    labels=("enhancement",),
)
SKIPS = Series(
    part="enrichment",
    name="promptmill_enhancement_skips_total",
    kind="counter",
    help="Calls of a part that were not made because it had failed a moment ago.",
    labels=("enhancement",),
)
SIDE_TASKS = Series(
    part="enrichment",
    name="promptmill_side_tasks",
    kind="gauge",
    help="Tasks that run beside requests now.",
)

# The worker's process.
WORKER = Series(
    part="process",
    name="promptmill_worker_info",
    kind="info",
    help="1; the labels say which worker this is.",
    labels=("worker", "model", "device", "version", "vllm_version"),
)
LOOP_LAG = Series(
    part="process",
    name="promptmill_event_loop_lag_seconds",
    kind="histogram",
    help="How late the event loop ran a timer, asked four times a second.",
)
RESIDENT = Series(
    part="process",
    name="promptmill_resident_memory_bytes",
    kind="gauge",
    help="Resident memory of the worker's processes: worker, engine, enrichment, other.",
    labels=("process",),
)

# What all workers share; each worker exports the same numbers, so take their max, not their sum.
QUEUE_JOBS = Series(
    part="deployment",
    name="promptmill_queue_jobs",
    kind="gauge",
    help="Jobs of the whole deployment that wait (queued) or run (running).",
    labels=("model", "namespace", "state"),
)
QUEUE_OLDEST = Series(
    part="deployment",
    name="promptmill_queue_oldest_age_seconds",
    kind="gauge",
    help="How long the oldest job that could run has been waiting; 0 when none waits.",
    labels=("model",),
)
QUEUE_COUNTED = Series(
    part="deployment",
    name="promptmill_queue_count_age_seconds",
    kind="gauge",
    help="How old the count of queued and running jobs is.",
)
WORKERS = Series(
    part="deployment",
    name="promptmill_workers",
    kind="gauge",
    help="Living workers of the whole deployment.",
    labels=("model",),
)
DEAD_MESSAGES = Series(
    part="deployment",
    name="promptmill_dead_messages",
    kind="gauge",
    help="Items of the queue that nobody could read and that were set aside.",
)

ALL: tuple[Series, ...] = tuple(
    value for value in dict(globals()).values() if isinstance(value, Series)
)
