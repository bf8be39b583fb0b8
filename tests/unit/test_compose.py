"""What compose.yaml and the Dockerfile promise, as far as that shows without a container engine."""

from __future__ import annotations

import json
import re
import shlex
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.command_lines import check_command
from workers.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose.yaml"
DOCKERFILE = ROOT / "Dockerfile"
WORKERS = ("worker-cpu", "worker-gpu")
# Variables that are not ours: of the images, of vLLM, of CUDA and of psql.
FOREIGN_VARIABLES = re.compile(r"(POSTGRES|VLLM|CUDA|PG|GF)_?[A-Z_]+$")
MONITORING = ("prometheus", "grafana")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Any]:
    return compose["services"]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, as pairs of keyword and the rest."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def test_compose_follows_the_specification(compose: dict[str, Any]):
    pytest.importorskip("check_jsonschema", reason="it brings the specification's JSON schema")
    import jsonschema

    schema = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(compose, json.loads(schema.read_text()))


def test_what_a_service_names_is_there(compose: dict[str, Any], services: dict[str, Any]):
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            condition = how["condition"]
            assert other in services, (name, other)
            assert "profiles" not in services[other], f"{name} waits for what may not be started"
            if condition == "service_healthy":
                assert "healthcheck" in services[other], (name, other)
            else:
                assert condition == "service_completed_successfully", (name, other)
                # What is restarted whenever it ends never ends.
                assert services[other]["restart"].startswith("on-failure"), other
        for secret in service.get("secrets", ()):
            source = secret if isinstance(secret, str) else secret["source"]
            assert source in compose["secrets"], (name, source)
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            known = (
                (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"]
            )
            assert known, (name, source)


def test_workers_wait_for_servers_tables_and_roles(services: dict[str, Any]):
    for name in WORKERS:
        needs = {other: how["condition"] for other, how in services[name]["depends_on"].items()}
        assert needs == {
            "valkey": "service_healthy",
            "migrate": "service_completed_successfully",
            "roles": "service_completed_successfully",
        }
    assert services["migrate"]["command"] == ["promptmill", "db", "upgrade"]
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"


def test_everything_that_lasts_is_watched_and_restarted(services: dict[str, Any]):
    for name in ("postgres", "valkey", *WORKERS, *MONITORING):
        assert services[name]["restart"] == "unless-stopped"
        assert services[name]["healthcheck"]["test"]
        assert "stop_grace_period" in services[name]


def test_a_worker_is_given_longer_to_stop_than_its_jobs_are(services: dict[str, Any]):
    for name in WORKERS:
        drain_s = float(services[name]["environment"]["PROMPTMILL_DRAIN_S"])
        grace = re.fullmatch(r"(\d+)s", services[name]["stop_grace_period"])
        assert grace is not None
        assert int(grace[1]) >= drain_s + 15


def test_the_queue_neither_forgets_nor_evicts(services: dict[str, Any]):
    command = services["valkey"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert any(volume.endswith(":/data") for volume in services["valkey"]["volumes"])


def test_a_gpu_worker_has_one_card(services: dict[str, Any]):
    worker = services["worker-gpu"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert len(device["device_ids"]) == 1
    assert worker["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert worker["profiles"] == ["gpu"]
    assert services["worker-cpu"]["profiles"] == ["cpu"]


def test_memory_is_reserved(services: dict[str, Any]):
    for name in ("postgres", "valkey", *WORKERS, *MONITORING):
        assert services[name]["deploy"]["resources"]["reservations"]["memory"], name


def test_monitoring_scrapes_every_worker(services: dict[str, Any]):
    for name in MONITORING:
        assert services[name]["profiles"] == ["monitoring"]
    (told,) = [word for word in services["prometheus"]["command"] if "config.file" in word]
    config = yaml.safe_load((ROOT / "deploy/prometheus" / Path(told).name).read_text())
    (job,) = config["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert sorted(found["names"]) == sorted(WORKERS)
    assert found["port"] == Settings.model_fields["metrics_port"].default
    for worker in WORKERS:
        assert services[worker]["environment"]["PROMPTMILL_METRICS_HOST"] == "0.0.0.0"  # noqa: S104  in its container
    for rules in config["rule_files"]:
        assert (ROOT / "deploy/prometheus" / rules).exists()
    sources = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/dashboards/promptmill.yaml").read_text()
    )
    path = boards["providers"][0]["options"]["path"]
    assert any(f":{path}/" in volume for volume in services["grafana"]["volumes"])


def test_images_are_pinned(services: dict[str, Any], instructions: list[tuple[str, str]]):
    for name, service in services.items():
        if "build" in service:
            assert service["image"] == f"promptmill:{service['build']['args']['DEVICE']}"
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", service["image"]), name
    arguments = dict(rest.split("=") for word, rest in instructions if word == "ARG")
    assert re.match(r"3\.1[12]\.\d+-slim", arguments["PYTHON"])
    for word, rest in instructions:
        if word == "RUN" and "pip install" in rest:
            pinned = re.search(r"\buv==\d", rest) or "--constraints" in rest or "--no-deps" in rest
            assert pinned, rest


def test_every_setting_named_exists(services: dict[str, Any]):
    known = {f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields}
    for service in services.values():
        targets = [
            secret["target"] for secret in service.get("secrets", ()) if isinstance(secret, dict)
        ]
        for name in [*service.get("environment", {}), *targets]:
            assert name in known or FOREIGN_VARIABLES.match(name), name


def test_no_password_stands_in_a_file(compose: dict[str, Any]):
    for secret in compose["secrets"].values():
        assert secret["file"].startswith("deploy/secrets/")
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD(?!_{1,2}FILE)|TOKEN|SECRET", variable), (name, variable)
            assert not re.search(r"://[^/\s]*@", str(value)), (name, variable)
    assert "/secrets/" in (ROOT / "deploy/.gitignore").read_text()


def test_servers_are_reached_from_this_machine_only(services: dict[str, Any]):
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


def test_every_promptmill_command_exists(
    services: dict[str, Any], instructions: list[tuple[str, str]]
):
    every = services.values()
    lists = [service["command"] for service in every if "command" in service]
    lists += [service["healthcheck"]["test"] for service in every if "healthcheck" in service]
    lists += [json.loads(rest) for word, rest in instructions if word in {"CMD", "ENTRYPOINT"}]
    found = [words[words.index("promptmill") + 1 :] for words in lists if "promptmill" in words]
    assert {words[0] for words in found} == {"worker", "db"}
    for words in found:
        check_command(words)
    modules = [words[words.index("-m") + 1] for words in lists if "-m" in words]
    assert modules
    for module in modules:
        assert find_spec(module) is not None, module


def test_the_dockerfile_copies_what_exists(instructions: list[tuple[str, str]]):
    stages = {rest.split(" AS ")[1] for word, rest in instructions if word == "FROM"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored, "a list of what is let in"
    for word, rest in instructions:
        if word == "FROM":
            base = rest.split(" AS ")[0]
            for device in ("light", "cpu", "gpu"):
                name = base.replace("${DEVICE}", device)
                assert name in stages or name == "python:${PYTHON}", name
        if word != "COPY":
            continue
        flags = [part for part in shlex.split(rest) if part.startswith("--")]
        *sources, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
        if origin := next((flag[7:] for flag in flags if flag.startswith("--from=")), None):
            assert origin in stages
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source.removeprefix('./')}" in ignored, f"{source} is kept from the build"


def test_the_image_runs_as_a_user_without_rights(instructions: list[tuple[str, str]]):
    last_stage = max(at for at, (word, _) in enumerate(instructions) if word == "FROM")
    (user,) = [rest for word, rest in instructions[last_stage:] if word == "USER"]
    assert user not in {"root", "0"}
    # In the image, a folder that is mounted over takes its owner along.
    assert f"useradd --uid 10001 --create-home {user}" in dict(instructions[last_stage:])["RUN"]


def test_set_up_and_image_install_alike(instructions: list[tuple[str, str]]):
    setup = (ROOT / "tools/setup.sh").read_text()
    version = re.search(r"^uv_version=(\S+)$", setup, re.MULTILINE)
    assert version is not None
    text = "\n".join(rest for _, rest in instructions)
    assert f"uv=={version[1]}" in text
    assert "grep -v '^torch' overrides.txt" in setup
    assert "grep -v '^torch' overrides.txt" in text
    assert "--torch-backend=cpu" in text
