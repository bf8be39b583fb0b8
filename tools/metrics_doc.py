"""Prints docs/metrics.md: every series, from the list that workers export.

``python tools/metrics_doc.py > docs/metrics.md``; a test compares the two.
"""

from __future__ import annotations

from workers import series

HEAD = f"""\
# Metrics, traces and logs

Every worker serves Prometheus metrics over HTTP, at `/metrics` on the first free port from
`PROMPTMILL_METRICS_PORT` (9464) on, so that the workers of a host have one each. `/targets` on any
of them lists all workers of the deployment, in the form of Prometheus' HTTP service discovery:
`deploy/prometheus/prometheus.yml` needs one address to find them all. They listen on this machine
alone; `PROMPTMILL_METRICS_HOST=0.0.0.0` lets a Prometheus elsewhere in, and then a firewall decides
who else. `deploy/prometheus/alerts.yml` holds alert rules, and `deploy/grafana/promptmill.json` a
dashboard, made by `python tools/grafana_dashboard.py`. `make test-ops` lets a real Prometheus scrape
a real worker and asks it every series and every query of the dashboard.

Each worker process exports what it counts itself, and no two share a file. What is read from the
servers (the last table) is the same on all workers: take its `max`, not its `sum`. Postgres is asked
once every five seconds for all of them together, less often where the answer takes long. Labels
hold no job ids and no prompts; the {series.BOUND} largest tenants, and as many models, have series of their
own, and the rest share `{series.OTHERS}`.

vLLM's own series (`vllm:…`: tokens, KV cache, latencies, prefix cache) and those of the process
(`process_…`, `python_…`) come with the same scrape.
"""

PARTS = {
    "jobs": "Jobs on this worker",
    "reuse": "Reuse",
    "enrichment": "Enrichment",
    "process": "The worker's processes",
    "deployment": "The whole deployment",
}

TAIL = """\

## Traces

`PROMPTMILL_OTLP_ENDPOINT` names an OpenTelemetry collector, `http://host:4318` or
`grpc://host:4317`; set it for workers and for producers. A job is then one trace from submission to
publication:

| Span | Made by | What it covers |
|---|---|---|
| `submit` | the client | writing rows and messages of one submission; `promptmill.jobs` says how many |
| `job` | the worker | from submission until the job is over; `promptmill.job_id`, tenant, model, attempt |
| `wait` | the worker | from submission until the claim |
| `answer` | the worker | the engine, with provenance and each stage's seconds as attributes |
| `llm_request` | vLLM | the request in vLLM: queue, prefill, decode |
| `commit`, `publish` | the worker | the two last steps |

The trace goes on from a span that the producer's own program has open. `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER` and the other variables of OpenTelemetry hold; a submission that was not
sampled makes no span anywhere. Where thousands of jobs come from the cache each second, sample at
the producers, for instance with `OTEL_TRACES_SAMPLER=parentbased_traceidratio` and
`OTEL_TRACES_SAMPLER_ARG=0.01`: on two cores a worker gave 3,518 jobs a second from its cache, and
2,314 with every one of them traced (`python -m tests.benchmarks.sight`). A repeat that a worker
answers without a run has the same spans but vLLM's; its steps were taken together with those of
other jobs, and last as long as theirs. No span holds a prompt, an answer or the text of an error.

## Logs

`PROMPTMILL_LOG_FORMAT=json` writes an object of JSON a line to standard error, Celery's lines and
those of vLLM's processes too (`VLLM_LOGGING_LEVEL` says which; a `VLLM_LOGGING_CONFIG_PATH` of your
own holds); what a library prints past all logging, such as a progress bar, stays as it is. A line that belongs to a job bears `job_id`, and `trace_id` where the submission was
traced; unless `PROMPTMILL_SHOW_PROMPTS` is set, it holds no prompt, no answer and no text of an
error, which may quote them. At the level INFO, the default, jobs that failed or expired have a line
each, and so have attempts that are made again; at DEBUG every job has one, with its state, provenance
and attempt. Passwords inside addresses are masked; tracebacks show no values.
"""


def table(part: str) -> str:
    """Return the table of one part's series.

    Args:
        part: As in `Series.part`.
    """
    rows = ["| Series | Kind | Labels | What it is |", "|---|---|---|---|"]
    for one in series.ALL:
        if one.part == part:
            labels = ", ".join(f"`{label}`" for label in one.labels)
            rows.append(f"| `{one.name}` | {one.kind} | {labels} | {one.help} |")
    return "\n".join(rows)


def render() -> str:
    """Return the page."""
    tables = [f"\n## {title}\n\n{table(part)}\n" for part, title in PARTS.items()]
    return HEAD + "".join(tables) + TAIL


if __name__ == "__main__":
    print(render(), end="")
