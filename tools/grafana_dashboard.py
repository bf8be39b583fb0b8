"""Prints deploy/grafana/promptmill.json: the dashboard, made with Grafana's own library.

``python tools/grafana_dashboard.py > deploy/grafana/promptmill.json``; a test compares the two, and
``make test-ops`` asks a real Prometheus every query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models.dashboard import DataSourceRef

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = 24
_RATE = "$__rate_interval"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: what it shows, and by which queries."""

    title: str
    queries: Sequence[tuple[str, str]]  # PromQL, and the legend
    unit: str = "short"
    kind: str = "lines"  # lines, areas (stacked), number or bars
    width: int = 8  # of 24
    help: str = ""
    most: float | None = None  # upper end of the axis


@dataclass(frozen=True, kw_only=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel] = field(default_factory=tuple)


def quantile(share: float, series: str, by: str = "") -> str:
    """Return the query of a histogram's quantile.

    Args:
        share: From 0 to 1.
        series: Name without ``_bucket``.
        by: A label that parts it further.
    """
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({series}_bucket[{_RATE}])))"


def rate(series: str, by: str = "") -> str:
    """Return the query of a counter's rate, summed over workers.

    Args:
        series: Name of the counter, with a selector if need be.
        by: Labels that part it.
    """
    return f"sum{f' by ({by})' if by else ''} (rate({series}[{_RATE}]))"


_WAITING = 'sum(max by (model, namespace) (promptmill_queue_jobs{state="queued"}))'
_TENANTS = "sum by (instance, namespace, state) (promptmill_queue_jobs)"
_PREFIX = f"{rate('vllm:prefix_cache_hits_total')} / {rate('vllm:prefix_cache_queries_total')}"
_HITS = f"({rate('promptmill_cache_hits_total')} or vector(0))"
_SHARED = rate("promptmill_coalesced_total")
_SAVED = f"({_HITS} + {_SHARED}) / {rate('promptmill_engine_requests_total')}"

ROWS = (
    Row(
        title="At a glance",
        panels=(
            Panel(
                title="Waiting",
                kind="number",
                width=4,
                queries=((f"{_WAITING} or vector(0)", ""),),
            ),
            Panel(
                title="Oldest waits for",
                kind="number",
                width=4,
                unit="s",
                queries=(("max(promptmill_queue_oldest_age_seconds)", ""),),
            ),
            Panel(
                title="Running",
                kind="number",
                width=4,
                queries=(("sum(promptmill_jobs_running)", ""),),
            ),
            Panel(
                title="Jobs done",
                kind="number",
                width=4,
                unit="ops",
                queries=((rate('promptmill_jobs_total{state="done"}'), ""),),
            ),
            Panel(
                title="Not computed again",
                kind="number",
                width=4,
                unit="percentunit",
                queries=((_SAVED, ""),),
            ),
            Panel(
                title="Workers",
                kind="number",
                width=4,
                queries=(("sum(max by (model) (promptmill_workers))", ""),),
            ),
        ),
    ),
    Row(
        title="Jobs",
        panels=(
            Panel(
                title="Jobs ended, by state",
                kind="areas",
                unit="ops",
                queries=((rate("promptmill_jobs_total", "state"), "{{state}}"),),
            ),
            Panel(
                title="Waiting and running, by tenant",
                kind="areas",
                queries=((f"max by (namespace, state) ({_TENANTS})", "{{namespace}} {{state}}"),),
            ),
            Panel(
                title="Age of the oldest job that could run",
                unit="s",
                queries=(
                    ("max by (model) (promptmill_queue_oldest_age_seconds)", "{{model}}"),
                    ("max(promptmill_queue_count_age_seconds)", "age of the count"),
                ),
            ),
            Panel(
                title="From submission to claim",
                unit="s",
                queries=(
                    (quantile(0.5, "promptmill_job_wait_seconds"), "half"),
                    (quantile(0.99, "promptmill_job_wait_seconds"), "99 %"),
                ),
            ),
            Panel(
                title="From claim to outcome, 95 %",
                unit="s",
                queries=(
                    (quantile(0.95, "promptmill_job_run_seconds", "provenance"), "{{provenance}}"),
                ),
            ),
            Panel(
                title="Slots in use",
                unit="percentunit",
                most=1,
                queries=(("promptmill_jobs_running / promptmill_job_slots", "{{instance}}"),),
            ),
            Panel(
                title="Retries, leases and returns",
                unit="ops",
                width=12,
                queries=(
                    (rate("promptmill_job_retries_total"), "tried again"),
                    (rate("promptmill_leases_expired_total"), "leases expired"),
                    (rate("promptmill_jobs_returned_total", "reason"), "returned: {{reason}}"),
                ),
            ),
            Panel(
                title="Put right by recovery",
                unit="ops",
                width=8,
                queries=((rate("promptmill_recovered_jobs_total", "action"), "{{action}}"),),
            ),
            Panel(
                title="Unreadable messages",
                kind="number",
                width=4,
                queries=(("max(promptmill_dead_messages)", ""),),
            ),
        ),
    ),
    Row(
        title="Reuse",
        panels=(
            Panel(
                title="How requests were answered",
                kind="areas",
                unit="ops",
                queries=(
                    (rate("promptmill_generations_total"), "generated"),
                    (rate("promptmill_cache_hits_total", "tier, kind"), "{{kind}}, {{tier}}"),
                    (rate("promptmill_coalesced_total"), "coalesced"),
                ),
            ),
            Panel(
                title="Share that was not computed again",
                unit="percentunit",
                most=1,
                queries=((_SAVED, "saved"),),
            ),
            Panel(
                title="Neighbours refused, by rule",
                kind="areas",
                unit="ops",
                queries=(
                    (rate("promptmill_reuse_refusals_total", "rule"), "{{rule}}"),
                    (rate("promptmill_reuse_served_total"), "served"),
                ),
            ),
            Panel(
                title="Memory tier",
                unit="bytes",
                width=12,
                queries=(("promptmill_memory_tier_bytes", "{{instance}}"),),
            ),
            Panel(
                title="Memory tier, answers and flights",
                width=12,
                queries=(
                    ("promptmill_memory_tier_entries", "answers {{instance}}"),
                    ("promptmill_flights", "flights {{instance}}"),
                ),
            ),
        ),
    ),
    Row(
        title="Enrichment",
        panels=(
            Panel(
                title="Stages, 95 %",
                unit="s",
                queries=((quantile(0.95, "promptmill_stage_seconds", "stage"), "{{stage}}"),),
            ),
            Panel(
                title="Failures and skips",
                unit="ops",
                queries=(
                    (
                        rate("promptmill_enhancement_failures_total", "enhancement"),
                        "{{enhancement}} failed",
                    ),
                    (
                        rate("promptmill_enhancement_skips_total", "enhancement"),
                        "{{enhancement}} left alone",
                    ),
                ),
            ),
            Panel(
                title="Tasks beside requests",
                queries=(("promptmill_side_tasks", "{{instance}}"),),
            ),
        ),
    ),
    Row(
        title="vLLM",
        panels=(
            Panel(
                title="Tokens a second",
                kind="areas",
                queries=(
                    (rate("vllm:generation_tokens_total"), "generated"),
                    (rate("vllm:prompt_tokens_total"), "prompts"),
                ),
            ),
            Panel(
                title="Tokens of the answers given, a second",
                kind="areas",
                queries=((rate("promptmill_job_tokens_total", "source"), "{{source}}"),),
            ),
            Panel(
                title="KV cache in use",
                unit="percentunit",
                most=1,
                queries=(("vllm:kv_cache_usage_perc", "{{instance}}"),),
            ),
            Panel(
                title="Requests in the engine",
                queries=(
                    ("sum(vllm:num_requests_running)", "running"),
                    ("sum(vllm:num_requests_waiting)", "waiting"),
                ),
            ),
            Panel(
                title="Time to first token",
                unit="s",
                queries=(
                    (quantile(0.5, "vllm:time_to_first_token_seconds"), "half"),
                    (quantile(0.99, "vllm:time_to_first_token_seconds"), "99 %"),
                ),
            ),
            Panel(
                title="Prefix cache, share of prompt tokens found",
                unit="percentunit",
                most=1,
                queries=((_PREFIX, "found"),),
            ),
        ),
    ),
    Row(
        title="Processes",
        panels=(
            Panel(
                title="Event loop, 99 % of timers no later than",
                unit="s",
                queries=(
                    (
                        quantile(0.99, "promptmill_event_loop_lag_seconds", "instance"),
                        "{{instance}}",
                    ),
                ),
            ),
            Panel(
                title="Memory",
                kind="areas",
                unit="bytes",
                queries=(
                    (
                        "sum by (instance, process) (promptmill_resident_memory_bytes)",
                        "{{instance}} {{process}}",
                    ),
                ),
            ),
            Panel(
                title="Processor of the worker's own process",
                queries=((f"rate(process_cpu_seconds_total[{_RATE}])", "{{instance}}"),),
            ),
            Panel(
                title="Which workers there are",
                kind="bars",
                width=24,
                queries=(
                    (
                        "promptmill_worker_info",
                        "{{worker}} {{device}} vLLM {{vllm_version}}",
                    ),
                ),
            ),
        ),
    ),
)


def queries() -> list[str]:
    """Return every query of the dashboard."""
    return [query for row in ROWS for panel in row.panels for query, _ in panel.queries]


def render() -> str:
    """Return the dashboard as JSON."""
    made = (
        dashboard.Dashboard("promptmill")
        .uid("promptmill")
        .tags(["promptmill"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .readonly()
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
    )
    for row in ROWS:
        made = made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _panel(of: Panel) -> timeseries.Panel | stat.Panel | bargauge.Panel:
    made: timeseries.Panel | stat.Panel | bargauge.Panel
    if of.kind == "number":
        last = common.ReduceDataOptions().calcs(["lastNotNull"])
        made = stat.Panel().height(4).graph_mode(kinds.BigValueGraphMode.AREA).reduce_options(last)
    elif of.kind == "bars":
        made = bargauge.Panel().height(5)
    else:
        made = timeseries.Panel().height(8).line_width(1).show_points(kinds.VisibilityMode.NEVER)
        made = made.fill_opacity(25 if of.kind == "areas" else 5)
        if of.kind == "areas":
            made = made.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL))
    made = made.title(of.title).description(of.help).unit(of.unit).span(of.width)
    made = made.datasource(_SOURCE).min(0)
    if of.most is not None:
        made = made.max(of.most)
    for letter, (query, legend) in zip("ABCDEFGH", of.queries, strict=False):
        target = prometheus.Dataquery().expr(query).legend_format(legend).ref_id(letter)
        made = made.with_target(target.datasource(_SOURCE))
    return made


if __name__ == "__main__":
    print(render(), end="")
