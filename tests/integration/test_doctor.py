"""The doctor finds nothing on the embedded default, and names the fault of what was broken."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy.engine import make_url

from schema import names
from tests.integration.builders import admit, spec
from workers import hardware, strangers
from workers.cli import main
from workers.doctor.database import clock
from workers.doctor.findings import Severity
from workers.servers import valkey_binary
from workers.store import schema_upgrade
from workers.store.jobs import JobStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.conftest import Cluster
    from workers.local import LocalStack
    from workers.store.database import Database

ROOT = Path(__file__).parents[2]


class Doctor:
    """Runs ``promptmill doctor --json`` and remembers what it found."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, code: int, *words: str) -> dict[str, Any]:
        """Run it; return its findings that are not well, by name."""
        self._capfd.readouterr()
        assert main(["doctor", "--json", *words]) == code, self._capfd.readouterr()
        said = json.loads(self._capfd.readouterr().out)
        checks = said["checks"]
        assert all(check.keys() == {"name", "severity", "found", "remedy"} for check in checks)
        bad = [check for check in checks if check["severity"] in {"warning", "error"}]
        assert all(check["remedy"] for check in bad)
        assert said["severity"] == {0: "ok", 1: "warning", 3: "error"}[code]
        return {check["name"]: check for check in bad}


@pytest.fixture
def doctor(
    monkeypatch: pytest.MonkeyPatch,
    stack: LocalStack,
    database_url: str,
    capfd: pytest.CaptureFixture[str],
) -> Doctor:
    """The subject, on servers that are well."""
    with Redis.from_url(stack.redis_url) as redis:
        redis.delete(names.DEAD_LETTERS)  # of other tests
    # This machine may be small, and full of what other tests keep running.
    monkeypatch.setattr(hardware, "memory_bytes", lambda: 64 * 10**9)
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 32 * 10**9)
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda _folder: 10**12)
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", database_url)
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", stack.redis_url)
    return Doctor(capfd)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start a Valkey with options of one's own; return its address."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> str:
        path = tmp_path / f"v{len(servers)}.sock"
        command = [str(valkey_binary()), "--port", "0", "--unixsocket", str(path)]
        command += ["--save", "", *options]
        servers.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL))
        until = time.monotonic() + 30
        while True:
            try:
                Redis(unix_socket_path=str(path)).ping()
            except RedisError:
                assert time.monotonic() < until
                time.sleep(0.02)
            else:
                return f"unix://{path}"

    yield start
    for server in servers:
        server.terminate()
        server.wait(30)


def execute(database_url: str, *statements: str) -> None:
    url = make_url(database_url).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def model_folder(folder: Path) -> Path:
    """A folder with all that a model needs, and one small tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    tensors = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = struct.pack("<Q", len(tensors)) + tensors + bytes(8)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_the_embedded_default_is_well(tmp_path: Path):
    """As a user runs it: in a process, with no address at all."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PROMPTMILL_")}
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli", "doctor"],
        env={**environment, "PROMPTMILL_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for name in ("pgvector", "migrations", "redis eviction", "clock (Postgres)", "model"):
        assert f"✓ {name}: " in done.stdout


def test_servers_of_ones_own_are_well(doctor: Doctor):
    assert doctor(0) == {}


@pytest.mark.parametrize(
    ("variable", "address", "name", "says"),
    [
        ("DATABASE_URL", "postgresql://me:hush@127.0.0.1:1/x", "postgres", "127.0.0.1:1/x"),
        ("REDIS_URL", "redis://:hush@127.0.0.1:1/0", "redis", "refused"),
    ],
)
def test_a_server_that_is_away(
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    address: str,
    name: str,
    says: str,
):
    monkeypatch.setenv(f"PROMPTMILL_{variable}", address)
    found = doctor(3)
    assert list(found) == [name]
    assert says in found[name]["found"]
    assert "hush" not in json.dumps(found)


def test_one_server_that_is_named_without_the_other(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PROMPTMILL_REDIS_URL")
    assert "set both, or neither" in doctor(3)["servers"]["found"]


def test_a_database_without_tables(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, empty_database_url: str
):
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", empty_database_url)
    found = doctor(3)
    assert found.keys() == {"pgvector", "migrations"}
    assert "promptmill db upgrade" in found["migrations"]["remedy"]


def test_a_database_that_does_not_exist(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
):
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", cluster.url_of("nowhere"))
    found = doctor(3)["postgres"]
    assert "does not exist" in found["found"]
    assert "make the database" in found["remedy"]


def test_tables_of_an_older_revision(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, empty_database_url: str
):
    schema_upgrade.upgrade(empty_database_url, revision="0001")
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", empty_database_url)
    found = doctor(3)["migrations"]
    assert "at revision 0001" in found["found"]
    assert "promptmill db upgrade" in found["remedy"]


def test_tables_of_a_newer_revision(doctor: Doctor, database_url: str):
    execute(database_url, "UPDATE alembic_version SET version_num = '9999'")
    assert "newer" in doctor(1)["migrations"]["found"]


def test_an_index_that_is_not_valid_and_one_that_is_missing(doctor: Doctor, database_url: str):
    execute(
        database_url,
        "UPDATE pg_index SET indisvalid = false "
        "WHERE indexrelid = 'ix_embeddings_minilm_hnsw'::regclass",
    )
    found = doctor(3)["indexes"]
    assert "ix_embeddings_minilm_hnsw is not valid" in found["found"]
    assert "REINDEX INDEX CONCURRENTLY ix_embeddings_minilm_hnsw" in found["remedy"]
    execute(database_url, "DROP INDEX ix_embeddings_minilm_hnsw")
    assert "ix_embeddings_minilm_hnsw is missing" in doctor(1)["indexes"]["found"]


def test_a_role_that_only_reads(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, database_url: str):
    url = make_url(database_url)
    name = url.database
    execute(database_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert doctor(1)["writable"]["found"] == "this role reads only"


def test_a_queue_that_forgets(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, valkey: Callable[..., str]
):
    url = valkey("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", url)
    found = doctor(3)
    assert found.keys() == {"redis eviction", "redis persistence"}
    assert "allkeys-lru" in found["redis eviction"]["found"]
    assert "noeviction" in found["redis eviction"]["remedy"]
    assert "appendonly yes" in found["redis persistence"]["remedy"]


def test_a_queue_that_is_nearly_full_of_what_nobody_can_read(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, valkey: Callable[..., str]
):
    url = valkey("--appendonly", "yes", "--maxmemory-policy", "noeviction")
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", url)
    with Redis.from_url(url) as redis:
        redis.lpush(names.DEAD_LETTERS, "nonsense")
        redis.config_set("maxmemory", redis.info("memory")["used_memory"])
    found = doctor(1)
    assert found.keys() == {"redis memory", "dead letters"}


def test_a_replica(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, valkey: Callable[..., str]):
    url = valkey("--appendonly", "yes", "--replicaof", "127.0.0.1 1")
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", url)
    assert "replica" in doctor(3)["redis role"]["found"]


def test_a_wrong_password(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, valkey: Callable[..., str]
):
    url = valkey("--appendonly", "yes")
    with Redis.from_url(url) as redis:
        redis.config_set("requirepass", "right")
        monkeypatch.setenv("PROMPTMILL_REDIS_URL", url.replace("unix://", "unix://:hush@"))
        found = doctor(3)
    assert "user and password" in found["redis"]["remedy"]
    assert "hush" not in json.dumps(found)


@pytest.mark.parametrize(
    ("breaking", "says"),
    [
        (shutil.rmtree, "is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{}"), "names no architecture"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 70), "is cut short"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-2.safetensors"}})
            ),
            "model-2.safetensors is missing",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded(
    doctor: Doctor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    breaking: Callable[[Path], object],
    says: str,
):
    folder = model_folder(tmp_path / "model")
    monkeypatch.setenv("PROMPTMILL_MODEL", str(folder))
    assert doctor(0) == {}
    breaking(folder)
    found = doctor(3)
    assert list(found) == ["model"]
    assert says in found["model"]["found"]


def test_a_model_that_is_not_here_yet(doctor: Doctor):
    assert "promptmill up" in doctor(1, "--model", "someone/something")["model"]["remedy"]


def test_a_misspelt_setting(doctor: Doctor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROMPTMILL_MODLE", "x")
    found = doctor(1)["settings"]
    assert "PROMPTMILL_MODLE" in found["found"]
    assert "PROMPTMILL_MODEL'" in found["remedy"]


def test_a_setting_that_cannot_be_used(doctor: Doctor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PROMPTMILL_LEASE_S", "soon")
    assert "PROMPTMILL_LEASE_S='soon'" in doctor(3)["settings"]["found"]


async def test_jobs_that_nobody_will_answer(doctor: Doctor, database: Database):
    await admit(JobStore(database), spec(model="no-such-model"))
    found = (await asyncio.to_thread(doctor, 1))["workers"]
    assert "1 jobs wait for no-such-model" in found["found"]


def test_what_was_left_behind(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PROMPTMILL_MODEL", str(model_folder(tmp_path / "model")))
    monkeypatch.setenv("PROMPTMILL_CACHE_DIR", str(tmp_path))
    (tmp_path / "models/.part-x").mkdir(parents=True)
    assert "half unpacked" in doctor(1)["leftovers"]["found"]


def test_a_full_disk(doctor: Doctor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "free_disk_bytes", lambda _folder: 10**8)
    found = doctor(3)
    assert found.keys() == {"disk (data)", "disk (cache)"}
    assert "PROMPTMILL_DATA_DIR" in found["disk (data)"]["remedy"]


@pytest.mark.parametrize("kind", ["module", "package"])
def test_foreign_packages(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
):
    if kind == "module":
        (tmp_path / "schema.py").write_text("")
    else:
        (tmp_path / "workers").mkdir()
        (tmp_path / "workers/__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    found = doctor(1)["foreign packages"]
    assert str(tmp_path) in found["found"]
    assert "uninstall" in found["remedy"]
    assert strangers.found([str(ROOT)]) == []


def test_a_foreign_package_that_hides_ours_is_named_by_every_command(tmp_path: Path):
    (tmp_path / "schema.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli", "version"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert str(tmp_path / "schema.py") in done.stderr
    assert "Traceback" not in done.stderr


def test_clocks_are_compared_by_what_the_way_there_cannot_explain():
    assert clock("x", 105.0, before=100.0, after=110.0).severity is Severity.OK
    assert clock("x", 115.0, before=100.0, after=110.0).severity is Severity.WARNING
    found = clock("x", 40.0, before=100.0, after=110.0)
    assert found.severity is Severity.ERROR
    assert found.found == "60.0 s behind"


def test_a_check_that_fails_ends_no_other(doctor: Doctor, monkeypatch: pytest.MonkeyPatch):
    def broken(_folder: Path) -> int:
        raise RuntimeError("broke")

    monkeypatch.setattr(hardware, "free_disk_bytes", broken)
    found = doctor(3)
    assert "RuntimeError: broke" in found["disk"]["found"]
    assert list(found) == ["disk"]


def test_a_producer_with_redis_alone_is_well(doctor: Doctor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PROMPTMILL_DATABASE_URL")
    assert doctor(0) == {}


def test_memory_that_caches_hold_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from workers import hardware

    limit, used, stat = tmp_path / "max", tmp_path / "current", tmp_path / "stat"
    limit.write_text("1000000000\n")
    used.write_text("900000000\n")
    stat.write_text("anon 100000000\ninactive_file 700000000\n")
    monkeypatch.setattr(hardware, "_CGROUP_LIMITS", (tmp_path / "none", limit))
    monkeypatch.setattr(hardware, "_CGROUP_USED", (used,))
    monkeypatch.setattr(hardware, "_CGROUP_STATS", (stat,))
    assert hardware.memory_bytes() == 10**9
    assert hardware.available_memory_bytes() == 8 * 10**8
