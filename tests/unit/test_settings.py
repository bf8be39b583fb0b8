"""What the environment decides, and how a wrong value is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from schema.errors import ConfigurationError
from workers.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PROMPTMILL_")]:
        monkeypatch.delenv(name)


def test_everything_has_a_default() -> None:
    settings = load_settings()
    assert settings.database_url is None
    assert settings.redis_url is None
    assert settings.model is None
    assert (settings.lease_s, settings.heartbeat_s, settings.max_attempts) == (10.0, 10.0 / 3, 3)
    assert settings.data_dir.is_absolute()


def test_every_field_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_the_folders_follow_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/x/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    settings = load_settings()
    assert settings.data_dir == Path("/x/data/promptmill")
    assert settings.cache_dir == Path("/x/cache/promptmill")


def test_root_keeps_its_data_where_services_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load_settings().data_dir == Path("/var/lib/promptmill")


def test_the_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_NAMESPACE", "acme")
    monkeypatch.setenv("PROMPTMILL_MODEL", "")  # as an empty line in an env file
    monkeypatch.setenv("PROMPTMILL_LEASE_S", "30")
    settings = load_settings(max_running=8, model=None)
    assert settings.namespace == "acme"
    assert settings.model is None
    assert settings.max_running == 8
    assert settings.heartbeat_s == 10.0


def test_a_relative_folder_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_DATA_DIR", "here")
    assert load_settings().data_dir == Path.cwd() / "here"


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", "postgresql://me:hunter2@db/mill")
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", "redis://:hunter2@broker")
    settings = load_settings()
    assert "hunter2" not in f"{settings!r} {settings} {settings.model_dump()}"
    assert settings.database_url.get_secret_value() == "postgresql://me:hunter2@db/mill"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        load_settings().namespace = "other"  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("LEASE_S", "soon", "number"),
        ("LEASE_S", "-1", "greater than 0"),
        ("LEASE_S", "nan", "finite number"),
        ("HEARTBEAT_S", "9", "at most half of lease_s"),
        ("MAX_RUNNING", "0", "greater than or equal to 1"),
        ("MAX_ATTEMPTS", "1.5", "integer"),
        ("NAMESPACE", "a b", "match pattern"),
        ("NAMESPACE", "x" * 65, "at most 64"),
        ("LOG_LEVEL", "LOUD", "DEBUG"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, hint: str
) -> None:
    monkeypatch.setenv(f"PROMPTMILL_{name}", value)
    with pytest.raises(ConfigurationError, match=f"PROMPTMILL_{name}='{value}'") as caught:
        load_settings()
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_address_is_named_without_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", "mysql://me:hunter2@db/mill")
    with pytest.raises(ConfigurationError, match="PROMPTMILL_DATABASE_URL") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)
    assert "postgresql://" in str(caught.value)


def test_all_faults_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_LEASE_S", "soon")
    monkeypatch.setenv("PROMPTMILL_QUEUE_LIMIT", "0")
    with pytest.raises(ConfigurationError, match=r"LEASE_S.*QUEUE_LIMIT"):
        load_settings()
