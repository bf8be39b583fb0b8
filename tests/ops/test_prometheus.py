"""A real Prometheus scrapes a real worker, and answers every query of the dashboard."""

from __future__ import annotations

import itertools
import json
import math
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psycopg
import pytest
import yaml
from sqlalchemy.engine import make_url

from tools import grafana_dashboard
from workers import JobClient, endpoints, series
from workers.devices import Device, Fleet
from workers.local import LocalStack
from workers.settings import Settings, load_settings

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]
PROMETHEUS = Path(__file__).parents[2] / "deploy/prometheus"
WAIT_S = 120.0
#: What the load makes go wrong on purpose.
ALARMING = {"PromptmillLeasesExpire"}
CITIES = ("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris", "Tokyo", "Sofia", "Rome", "Accra")


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


def wait_for(condition: Callable[[], Any], what: str | Callable[[], Any]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def settings(stack: LocalStack) -> Settings:
    return load_settings(data_dir=Path(stack.data_dir), metrics_port=free_port())


class Load:
    """Jobs of every kind, again and again, as long as somebody looks; on a thread of its own.

    A counter that appears has no rate before it has grown, so once is not enough.
    """

    def __init__(self, client: JobClient, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._over = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        try:
            for number in itertools.count():
                if self._over.is_set():
                    return
                self._once(f"{CITIES[number % len(CITIES)]} {'again ' * (number // len(CITIES))}")
        except BaseException as exc:  # noqa: BLE001  told where it is looked for
            self.error = exc

    def _once(self, place: str) -> None:
        ask = self._ask
        for _ in range(2):  # from the model, and from the cache
            ask(f"Two and two in {place} are")
        self._client.submit_many([f"Coalesced in {place}"] * 2, sampling={"max_tokens": 64})
        ask(f"How do I bake sourdough bread in {place}?")
        ask(f"How can I bake sourdough bread in {place}?", reuse="semantic", max_tokens=128)
        ask(f"Which birds can fly in {place}?")
        ask(f"Which birds cannot fly in {place}?", reuse="semantic")
        assert self._client.submit("word " * 9000).result(WAIT_S).error is not None
        for stop in (self._client.cancel, self._give_to_another):
            sampling = {"max_tokens": 400, "ignore_eos": True}
            job = self._client.submit(f"Count in {place}:", sampling=sampling, reuse="off")
            wait_for(lambda job=job: job.status().state == "running", "no job runs")  # type: ignore[misc]  # mypy infers no defaults of a lambda
            stop(job.id)

    def _ask(self, prompt: str, *, max_tokens: int = 8, **options: Any) -> None:
        sampling = {"max_tokens": max_tokens}
        self._client.submit(prompt, sampling=sampling, **options).result(WAIT_S)

    def _give_to_another(self, job_id: UUID) -> None:
        """Let a job be another worker's, which dies with it: its lease ends."""
        with psycopg.connect(self._url(), autocommit=True) as connection:
            connection.execute(
                "UPDATE jobs SET token = token + 1, lease_until = now() - interval '1 second'"
                " WHERE id = %s",
                (job_id,),
            )

    def _url(self) -> str:
        url = make_url(endpoints.find(self._settings).database_url or "")
        return url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def worked(settings: Settings) -> Iterator[Load]:
    """A worker that has answered, and goes on to: anew, from the cache, by meaning, and not."""
    fleet = Fleet(settings, [Device()])
    fleet.start()
    try:
        fleet.wait_ready(timeout_s=300)
        with JobClient.from_settings(settings) as client, Load(client, settings) as load:
            yield load
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def prometheus(worked: Load, settings: Settings, tmp_path_factory: Any) -> Iterator[Prometheus]:
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


def test_each_rule_alarms_when_it_should_and_not_before():
    cases = Path(__file__).with_name("alerts_test.yml")
    done = subprocess.run(
        ["promtool", "test", "rules", cases], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_worker_serves_follows_the_conventions(prometheus: Prometheus, settings: Settings):
    address = f"http://127.0.0.1:{settings.metrics_port}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        served = answer.read()
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=served, capture_output=True, check=False
    )
    faults = [line for line in done.stderr.decode().splitlines() if line.startswith("promptmill_")]
    assert done.returncode in {0, 3}, done.stderr  # 3: something to say, be it of vLLM's names
    assert faults == []


def test_the_worker_is_found_and_up(prometheus: Prometheus):
    active = prometheus.get("targets")["activeTargets"]
    assert [target["health"] for target in active] == ["up"]
    assert active[0]["labels"]["worker"].startswith("smollm2-135m-instruct@")


def test_every_series_arrives(prometheus: Prometheus):
    def present() -> set[str]:
        return set(prometheus.get("label/__name__/values"))

    def missing() -> set[str]:
        return {one.name for one in series.ALL if not present() & set(one.samples)}

    wait_for(lambda: not missing(), missing)
    assert {"vllm:kv_cache_usage_perc", "vllm:generation_tokens_total"} <= present()
    assert "process_resident_memory_bytes" in present()


def test_jobs_are_counted_by_how_they_ended(prometheus: Prometheus, worked: Load):
    wanted = {("done", how) for how in ("generated", "exact", "semantic", "coalesced")}
    wanted |= {("failed", "none"), ("cancelled", "none")}

    def missing() -> set[tuple[str, str]]:
        found = prometheus.values("promptmill_jobs_total > 0")
        return wanted - {(one["metric"]["state"], one["metric"]["provenance"]) for one in found}

    wait_for(lambda: not missing() or worked.error is not None, missing)
    assert worked.error is None


@pytest.mark.parametrize("query", grafana_dashboard.queries())
def test_every_query_of_the_dashboard_has_data(prometheus: Prometheus, query: str):
    filled = query.replace("$__rate_interval", "1m").replace("$__range", "5m")
    filled = filled.replace("$model", ".*").replace("$namespace", ".*")
    assert "$" not in filled

    def numbers() -> list[float]:
        found = [float(one["value"][1]) for one in prometheus.values(filled)]
        return [value for value in found if not math.isnan(value)]

    wait_for(numbers, "no data")


def test_rules_are_evaluated_and_only_what_went_wrong_is_alarming(prometheus: Prometheus):
    (group, *rest) = prometheus.get("rules")["groups"]
    rules = [rule for one in (group, *rest) for rule in one["rules"]]
    assert rules
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert {rule["name"] for rule in rules if rule["state"] == "firing"} <= ALARMING
