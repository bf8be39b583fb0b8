"""A real Prometheus scrapes a real worker, and answers every query of the dashboard."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import grafana_dashboard
from workers import JobClient, series
from workers.devices import Device, Fleet
from workers.local import LocalStack
from workers.settings import Settings, load_settings

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]
PROMETHEUS = Path(__file__).parents[2] / "deploy/prometheus"
WAIT_S = 120.0
#: They need something to go wrong: a job tried again, a dead worker, a part that fails.
ONLY_AFTER_TROUBLE = {
    series.JOBS_RETURNED,
    series.RECOVERED,
    series.REUSE_REFUSALS,
    series.FAILURES,
    series.SKIPS,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **words: str) -> Any:
        asked = f"{self.url}/{path}?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310  of our own making
            read = json.load(answer)
        assert read["status"] == "success", read
        return read["data"]

    def values(self, query: str) -> list[Any]:
        return list(self.get("query", query=query)["result"])


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def settings(stack: LocalStack) -> Settings:
    return load_settings(data_dir=Path(stack.data_dir), metrics_port=free_port())


@pytest.fixture(scope="module")
def worked(settings: Settings) -> Iterator[None]:
    """A worker that has answered, from the model and from the cache, and refused."""
    fleet = Fleet(settings, [Device()])
    fleet.start()
    try:
        fleet.wait_ready(timeout_s=300)
        with JobClient.from_settings(settings) as client:
            for _ in range(2):
                client.submit("Two and two are", sampling={"max_tokens": 8}).result(WAIT_S)
            assert client.submit("word " * 9000).result(WAIT_S).error is not None
            # One that is under way, so that there is something in the queue.
            busy = client.submit(
                "Count on:", sampling={"max_tokens": 3500, "ignore_eos": True}, reuse="off"
            )
            yield
            busy.cancel()
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def prometheus(worked: None, settings: Settings, tmp_path_factory: Any) -> Iterator[Prometheus]:
    """With the configuration that is shipped, but for the worker's address and the pace."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    discovery = {
        "url": f"http://127.0.0.1:{settings.metrics_port}/targets",
        "refresh_interval": "1s",
    }
    config["scrape_configs"][0]["http_sd_configs"] = [discovery]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("wb"),
    )
    server = Prometheus(port)

    def scraped_twice() -> bool:
        # Rates need two scrapes.
        try:
            return bool(server.values("count_over_time(up[1m]) >= 3"))
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            return False

    try:
        wait_for(scraped_twice, "Prometheus has scraped no worker")
        yield server
    finally:
        process.terminate()
        process.wait(30)


def test_rules_and_configuration_are_sound():
    for words in (("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml")):
        done = subprocess.run(
            ["promtool", *words], cwd=PROMETHEUS, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_worker_is_found_and_up(prometheus: Prometheus):
    active = prometheus.get("targets")["activeTargets"]
    assert [target["health"] for target in active] == ["up"]
    assert active[0]["labels"]["worker"].startswith("smollm2-135m-instruct@")


def test_every_series_arrives(prometheus: Prometheus):
    present = set(prometheus.get("label/__name__/values"))
    missing = {
        one.name
        for one in series.ALL
        if one not in ONLY_AFTER_TROUBLE and not present & set(one.samples)
    }
    assert missing == set()
    assert {"vllm:kv_cache_usage_perc", "vllm:generation_tokens_total"} <= present
    assert "process_resident_memory_bytes" in present


def test_jobs_are_counted_by_how_they_ended(prometheus: Prometheus):
    found = {
        (one["metric"]["state"], one["metric"]["provenance"]): int(one["value"][1])
        for one in prometheus.values("promptmill_jobs_total")
    }
    assert found == {("done", "generated"): 1, ("done", "exact"): 1, ("failed", "none"): 1}


@pytest.mark.parametrize("query", grafana_dashboard.queries())
def test_every_query_of_the_dashboard_is_answered(prometheus: Prometheus, query: str):
    filled = query.replace("$__rate_interval", "1m").replace("$__range", "5m")
    filled = filled.replace("$model", ".*").replace("$namespace", ".*")
    assert "$" not in filled
    prometheus.values(filled)


def test_rules_are_evaluated_and_nothing_is_alarming(prometheus: Prometheus):
    (group, *rest) = prometheus.get("rules")["groups"]
    rules = [rule for one in (group, *rest) for rule in one["rules"]]
    assert rules
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
