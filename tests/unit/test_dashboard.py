"""The dashboard and the alert rules ask only for series that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tools import grafana_dashboard
from workers import series

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/alerts.yml"
CASES = ROOT / "tests/ops/alerts_test.yml"  # of `promtool test rules`, in `make test-ops`
#: vLLM's, the process' and Prometheus' own; a real scrape has them in `make test-ops`.
FOREIGN = re.compile(r"(vllm:|process_|python_)\w+|up")
_WORDS = re.compile(
    r"\b(by|on|and|or|sum|max|min|rate|increase|absent|unless|vector|histogram_quantile|clamp_min)\b"
)


def expressions() -> list[str]:
    read = yaml.safe_load(RULES.read_text())
    return [rule["expr"] for group in read["groups"] for rule in group["rules"]]


def names(query: str) -> set[str]:
    """Series that a query reads."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on) \([^)]*\)", " ", query)
    return {word for word in re.findall(r"[a-z_][\w:]*", bare) if not _WORDS.fullmatch(word)}


def test_the_dashboard_is_the_one_that_the_tool_makes():
    page = (ROOT / "deploy/grafana/promptmill.json").read_text()
    assert page == grafana_dashboard.render(), (
        "run: python tools/grafana_dashboard.py > deploy/grafana/promptmill.json"
    )
    panels = [panel for panel in json.loads(page)["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    assert asked == grafana_dashboard.queries()


@pytest.mark.parametrize("query", [*grafana_dashboard.queries(), *expressions()])
def test_queries_name_series_that_there_are(query: str):
    known = {sample for one in series.ALL for sample in one.samples}
    unknown = {name for name in names(query) if name not in known and not FOREIGN.fullmatch(name)}
    assert names(query)
    assert unknown == set()


def test_every_rule_is_seen_to_alarm():
    rules = yaml.safe_load(RULES.read_text())["groups"]
    named = {rule["alert"] for group in rules for rule in group["rules"]}
    fired = re.findall(r'alertname="(\w+)"', CASES.read_text())
    assert named == set(fired)


def test_every_series_is_looked_at():
    read = set().union(*(names(query) for query in grafana_dashboard.queries()))
    unseen = {one.name for one in series.ALL if not read & set(one.samples)}
    assert unseen == set()


def test_names_follow_the_conventions():
    for one in series.ALL:
        assert re.fullmatch(r"promptmill_[a-z_]+", one.name)
        assert (one.kind == "counter") == one.name.endswith("_total"), one.name
        assert not set(one.labels) & {"job_id", "prompt", "request_id", "answer_id", "instance"}
        assert one.help.endswith("."), one.name
    assert len({one.name for one in series.ALL}) == len(series.ALL)
