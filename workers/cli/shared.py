"""What all commands share: settings, output, exit codes and errors of one line."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schema.errors import (
    CallerError,
    ConfigurationError,
    InvalidRequestError,
    PromptmillError,
    ResultTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from schema.jobs import JobStatus
    from workers.settings import Settings

OK = 0
#: A job or a row failed.
FAILED = 1
#: The command was used wrongly, or its input cannot be accepted.
USAGE = 2
#: A server or the engine cannot be used now.
UNAVAILABLE = 3
TIMEOUT = 124
INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 done, 1 a job or row failed, 2 wrong usage or input, "
    "3 a service is unavailable, 124 out of time, 130 interrupted."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Tenant. Default: PROMPTMILL_NAMESPACE.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Served model. Default: the deployment's.")
]


def exit_code(error: BaseException) -> int:
    """Return the exit code that an error means.

    Args:
        error: What a command raised.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ResultTimeoutError):
        return TIMEOUT
    if isinstance(error, CallerError):
        return USAGE
    return UNAVAILABLE if isinstance(error, PromptmillError) else FAILED


def settings_with(**overrides: object) -> Settings:
    """Read the settings, under what the command line says.

    Args:
        overrides: Fields; None leaves one to the environment.

    Raises:
        ConfigurationError: A value cannot be used.
    """
    from workers.settings import load_settings

    return load_settings(**overrides)


def print_json(value: Any, *, indent: bool = True) -> None:
    """Print a value as JSON on standard output.

    Args:
        value: JSON types, pydantic models, UUIDs and times.
        indent: Over several lines, for people too.
    """
    import orjson

    option = orjson.OPT_APPEND_NEWLINE | (orjson.OPT_INDENT_2 if indent else 0)
    sys.stdout.write(orjson.dumps(value, default=_jsonable, option=option).decode())
    sys.stdout.flush()


def _jsonable(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def say(text: str) -> None:
    """Tell a person something, on standard error.

    Args:
        text: One line.
    """
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def for_people() -> bool:
    """Whether standard error is a terminal, so that progress may be shown."""
    return sys.stderr.isatty()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on standard output; plain and full width where that is no terminal.

    Args:
        columns: Headings.
        rows: Values, shown as text; None is empty.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        made.add_row(*("" if value is None else str(value) for value in row))
    console.print(made)


def job_rows(statuses: Iterable[JobStatus]) -> None:
    """Print jobs as a table.

    Args:
        statuses: In order.
    """
    columns = ("job", "state", "model", "attempts", "created", "provenance", "row", "error")
    table(columns, (_job_row(status) for status in statuses))


def _job_row(status: JobStatus) -> Sequence[object]:
    error = status.error.message.splitlines()[0][:60] if status.error else None
    created = status.created_at.strftime("%Y-%m-%d %H:%M:%S")
    provenance = status.provenance.value if status.provenance else None
    return (
        status.job_id,
        status.state.value,
        status.model,
        status.attempts,
        created,
        provenance,
        status.custom_id,
        error,
    )


def job_id(text: str) -> UUID:
    """Read the id of a job or a batch.

    Args:
        text: As on the command line.

    Raises:
        InvalidRequestError: It is no UUID.
    """
    from uuid import UUID

    try:
        return UUID(text)
    except ValueError:
        msg = "is not an id, such as 6f9619ff-8b86-4d01-b42d-00cf4fc964ff"
        raise InvalidRequestError(msg, field="id", value=text) from None


def need_worker_package() -> None:
    """Refuse early what needs vLLM where it is not installed.

    Raises:
        ConfigurationError: It is not installed.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        msg = "a worker needs vLLM, which is not installed: pip install 'promptmill[cpu]' or [gpu]"
        raise ConfigurationError(msg)
