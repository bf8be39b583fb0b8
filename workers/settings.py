"""Everything the environment decides, read once into one value."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import Field, PositiveFloat, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from schema.errors import ConfigurationError, shown

ENV_PREFIX = "PROMPTMILL_"
# Of the processes among themselves, of the container's entry point, and of tests.
_NO_SETTINGS = frozenset({"PROMPTMILL_SUPERVISED", "PROMPTMILL_FAMILY", "PROMPTMILL_SECRETS_DIR"})
_OF_TESTS = ("PROMPTMILL_TEST_", "PROMPTMILL_FAULT_")
_SECRET_FIELDS = frozenset({"database_url", "redis_url"})


def default_data_dir() -> Path:
    """Return where the embedded servers keep their data unless told otherwise.

    Root's own home is closed to the unprivileged user that the servers run as, so root's data
    stands where a system service keeps it.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/promptmill")
    return platformdirs.user_data_path("promptmill", appauthor=False)


def default_cache_dir() -> Path:
    """Return where the bundled model goes unless told otherwise."""
    return platformdirs.user_cache_path("promptmill", appauthor=False)


class Settings(BaseSettings):
    """The settings of one process, each from ``PROMPTMILL_<NAME>``.

    Use ``load_settings`` to read them with a clear error.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        env_ignore_empty=True,
        allow_inf_nan=False,
    )

    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Folder of the embedded Postgres and Valkey. Default: the user's data folder; "
        "for root, /var/lib/promptmill.",
    )
    cache_dir: Path = Field(
        default_factory=default_cache_dir,
        description="Folder of the bundled model. Default: the user's cache folder.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="Postgres with pgvector, as postgresql://user:password@host/name. "
        "Unset: the embedded one.",
    )
    redis_url: SecretStr | None = Field(
        default=None,
        description="Redis or Valkey, as redis://, rediss:// or unix://. Unset: the embedded one.",
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        description="Model folder or hub name that workers serve. Unset: the bundled model.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name under which jobs ask for the model. Unset: the model's own name.",
    )
    engine_config: Path | None = Field(
        default=None,
        description="JSON file of the enhanced engine: what is on, budgets, reuse by namespace "
        "(see docs/engine.md). Unset: its defaults.",
    )
    namespace: str = Field(
        default="default",
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Tenant of jobs that name none: letters, digits, '.', '_' and '-'.",
    )
    lease_s: float = Field(
        # With the two seconds between looks for ended leases, a worker's death costs less than 15.
        default=10.0,
        gt=0,
        le=3600,
        description="Seconds a worker owns a job without a heartbeat; then another may claim it.",
    )
    heartbeat_s: float = Field(
        default_factory=lambda read: read.get("lease_s", 10.0) / 3,
        gt=0,
        le=1800,
        description="Seconds between two heartbeats, at most half of lease_s. Default: a third.",
    )
    engine_timeout_s: float = Field(
        default=120.0,
        ge=1,
        description="Seconds that vLLM's engine may leave the worker without an answer; then it "
        "counts as hung: its jobs go back, and the worker is replaced.",
    )
    message_jobs: int = Field(
        default=128, ge=1, le=4096, description="Most jobs that one queue message carries."
    )
    max_running: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Engine slots: jobs that one worker runs at once. "
        "Default: as many as the engine does, which is vLLM's max_num_seqs.",
    )
    queue_limit: int = Field(
        default=1_000_000,
        ge=1,
        description="Most jobs that may wait; beyond it a submission is refused.",
    )
    namespace_window: int | None = Field(
        default=None,
        ge=1,
        description="Jobs of one namespace that may stand in a model's queue; further ones wait in "
        "Postgres and are let in by turns. Unset: three rounds of the workers' slots, or what they "
        "take in a second.",
    )
    namespace_weights: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description='Shares of namespaces when there is more than can be run, as {"name": 3}; '
        "1 for those not named. Read by workers.",
    )
    max_attempts: int = Field(
        default=3, ge=1, le=100, description="Times a job is tried before it is set aside."
    )
    max_prompt_bytes: int = Field(
        default=1_000_000, ge=1, description="Longest prompt accepted, in bytes of UTF-8."
    )
    result_ttl_s: float = Field(
        default=86_400.0,
        gt=0,
        description="Seconds a published result stays on its channel. Postgres keeps the answer.",
    )
    retention_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that jobs which are over, their results and stored answers are kept. "
        "Unset: for ever, within answers_limit. Read by workers.",
    )
    namespace_retention_s: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description='The same for namespaces that differ, as {"name": 86400}. Read by workers.',
    )
    answers_limit: int = Field(
        default=1_000_000,
        ge=1,
        description="Most answers a namespace keeps; beyond it those worth least are removed.",
    )
    drain_s: float = Field(
        default=30.0,
        ge=0,
        le=86_400,
        description="Seconds a stopping worker gives its running jobs.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe log line: DEBUG, INFO, WARNING or ERROR."
    )
    log_format: Literal["console", "json"] = Field(
        default="console",
        description="How a worker's log lines look: for people, or an object of JSON a line.",
    )
    show_prompts: bool = Field(
        default=False,
        description="Whether a worker writes what each job asks for, its prompt among it, to its "
        "log, and shows it in `celery inspect active`. Unset: prompts are in neither.",
    )
    metrics_port: int = Field(
        default=9464,
        ge=0,
        le=65535,
        description="First port tried for a worker's Prometheus metrics; each worker of a host "
        "takes the next free one of a hundred. 0 switches them off.",
    )
    metrics_host: str = Field(
        default="127.0.0.1",
        description="Address that metrics are served on; 0.0.0.0 for a Prometheus elsewhere.",
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^(https?|grpc)://.+",
        description="OpenTelemetry collector that gets traces, as http://host:4318 or "
        "grpc://host:4317. Unset: no traces. OTEL_* variables (sampler, service name) hold.",
    )

    @field_validator("data_dir", "cache_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        # The servers do not share this process's working folder.
        return value.expanduser().absolute()

    @field_validator("engine_config")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if not (path := value.expanduser().absolute()).is_file():
            msg = "there is no such file"
            raise ValueError(msg)
        return path

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("database_url")
    @classmethod
    def _postgres(cls, value: SecretStr | None) -> SecretStr | None:
        return _checked_scheme(
            value, ("postgresql://", "postgres://", "postgresql+psycopg://"), "postgresql://"
        )

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr | None) -> SecretStr | None:
        return _checked_scheme(value, ("redis://", "rediss://", "unix://"), "redis://")

    @field_validator("heartbeat_s")
    @classmethod
    def _beats_within_lease(cls, value: float, info: Any) -> float:
        lease_s = info.data.get("lease_s")
        if lease_s is not None and value > lease_s / 2:
            msg = f"it must be at most half of lease_s ({lease_s:g})"
            raise ValueError(msg)
        return value


def load_settings(**overrides: object) -> Settings:
    """Read the settings from the environment.

    Args:
        overrides: Fields that the caller decides, over the environment; None leaves a field alone.

    Returns:
        The settings; their repr masks secrets.

    Raises:
        ConfigurationError: A variable holds a value that cannot be used; the message names the
            variable, the value and what would be right.
    """
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ConfigurationError(_one_line(error)) from None
    except SettingsError as error:
        # What is to be an object, as the weights are, and is no JSON.
        field = str(error).split('"')[1] if '"' in str(error) else "settings"
        msg = f'{ENV_PREFIX}{field.upper()}: it must be a JSON object such as {{"name": 2}}'
        raise ConfigurationError(msg) from None


def unknown_variables() -> list[str]:
    """Return variables that look like settings and are none: misspelt ones, most likely."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | _NO_SETTINGS
    return sorted(
        name
        for name in os.environ
        if name.startswith(ENV_PREFIX) and name not in known and not name.startswith(_OF_TESTS)
    )


def _checked_scheme(
    value: SecretStr | None, schemes: tuple[str, ...], example: str
) -> SecretStr | None:
    if value is not None and not value.get_secret_value().startswith(schemes):
        msg = f"it must begin with {example}"
        raise ValueError(msg)
    return value


def _one_line(error: ValidationError) -> str:
    # All faults at once, so that a bad environment is mended in one go.
    faults = []
    for fault in error.errors(include_url=False):
        if fault["type"] == "default_factory_not_called":  # it follows from another fault
            continue
        field = str(fault["loc"][0]) if fault["loc"] else "settings"
        value = "(hidden)" if field in _SECRET_FIELDS else shown(fault["input"])
        reason = fault["msg"].removeprefix("Value error, ")
        for opening in ("Input should", "String should"):
            reason = reason.replace(opening, "it must")
        faults.append(f"{ENV_PREFIX}{field.upper()}={value}: {reason}")
    return "; ".join(faults)
