"""Imports point one way, and some things are done in one place only. Read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("schema", "workers", "migrations", "tools")
# Who may read or write the environment, and why.
ENVIRONMENT = {
    "workers/settings.py": "the one reader of our own settings (through pydantic-settings)",
    "workers/devices.py": "hands its own environment on to workers, with devices added",
    "workers/enrich/child.py": "hands its own environment on to the child it starts",
    "workers/cli/deployment.py": "says of each setting whether a variable gave it",
    "workers/pinning.py": "says what it was bound to, and how much memory may be divided",
    "workers/local.py": "hands its own environment on to the supervisor, without Postgres' own",
    "workers/serving.py": "gives vLLM's own variables their defaults before vLLM reads them",
    "workers/supervisor.py": "looks where the system wants sockets to be",
    "tools/preflight.py": "runs before anything of ours is installed",
}
# What each part of workers may use of ours beside `schema` and itself.
ENGINE = {"workers.engine", "workers.cache.memory"}
ADAPTERS = {"workers.engine.protocols", "workers.engine.config"}


def sources(*parts: str) -> list[Path]:
    found = []
    for part in parts:
        path = ROOT / part
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert found
    return [path for path in found if "__pycache__" not in path.parts]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Names of what a file imports, wherever in it and for whatever use."""
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if is_module(whole) else module


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if within(name, *OURS)}


def foreign(path: Path) -> set[str]:
    tops = {name.split(".")[0] for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - set(OURS)


@pytest.mark.parametrize("path", sources("schema"), ids=name_of)
def test_schema_is_at_the_bottom(path: Path):
    assert {name for name in ours(path) if not within(name, "schema")} == set()
    assert foreign(path) <= {"pydantic", "orjson", "sqlalchemy", "pgvector"}


@pytest.mark.parametrize("path", sources("workers/engine"), ids=name_of)
def test_the_engine_knows_no_queue_and_no_database(path: Path):
    assert (
        foreign(path) & {"celery", "kombu", "sqlalchemy", "psycopg", "pgvector", "redis"} == set()
    )
    beside = {name for name in ours(path) if not within(name, "schema", *ENGINE)}
    if name_of(path) == "workers.engine.parts":
        # What nobody has named is made here, and imported only then.
        made = {name for name in beside if within(name, "workers.enrich")}
        top_level = [node for node in tree(path).body if isinstance(node, ast.ImportFrom)]
        assert made.isdisjoint({node.module for node in top_level})
        beside -= made
    assert beside == set()


@pytest.mark.parametrize("part", ["cache", "enrich", "store"])
def test_adapters_know_the_protocols_only(part: str):
    for path in sources(f"workers/{part}"):
        beside = {
            name for name in ours(path) if not within(name, "schema", f"workers.{part}", *ADAPTERS)
        }
        if part == "store" and name_of(path) == "workers.store.schema_upgrade":
            beside -= {"migrations"}
        assert beside == set(), path


def test_celery_is_known_to_few():
    few = {
        "workers.app",
        "workers.envelope",
        "workers.pool",
        "workers.pool_loop",
        "workers.pool_task",
        "workers.tasks",
        "workers.transport",
    }
    users = {
        name_of(path)
        for path in sources("schema", "workers", "migrations")
        if foreign(path) & {"celery", "kombu", "billiard", "vine"}
    }
    assert users <= few


def test_the_client_needs_no_worker():
    heavy = {"vllm", "torch", "spacy", "transformers", "sentence_transformers", "celery", "kombu"}
    light = ["client", "aio_client", "jobs", "submission", "sending", "outcome", "connection"]
    light += ["settings", "channel", "consumer", "token_stream", "batch", "endpoints", "health"]
    for name in light:
        assert foreign(ROOT / f"workers/{name}.py") & heavy == set(), name


def test_nothing_pickles():
    for path in sources("schema", "workers", "migrations", "tools"):
        picklers = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
        assert {name.split(".")[0] for name in imports(path)} & picklers == set(), path
        for node in ast.walk(tree(path)):
            # Serializers are named in settings, and allowed ones in lists.
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in {"pickle", "application/x-python-serialize"}, path


def test_the_environment_is_read_in_few_places():
    for path in sources("schema", "workers", "migrations", "tools"):
        used = [
            node
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr in {"environ", "environb", "getenv", "putenv"}
        ]
        assert not used or str(path.relative_to(ROOT)) in ENVIRONMENT, path


def test_every_exception_is_still_needed():
    for name in set(ENVIRONMENT) - {"workers/settings.py"}:
        assert "os.environ" in (ROOT / name).read_text(), name


def test_no_engine_session_or_broker_is_made_by_an_import():
    makers = {"create_engine", "create_async_engine", "Celery", "from_url", "sessionmaker"}
    for path in sources("schema", "workers"):
        for statement in tree(path).body:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            for node in ast.walk(statement):
                if isinstance(node, ast.Call):
                    called = node.func
                    name = called.attr if isinstance(called, ast.Attribute) else None
                    name = called.id if isinstance(called, ast.Name) else name
                    assert name not in makers, f"{path}:{node.lineno}"
