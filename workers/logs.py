"""Log lines: ours, Celery's and vLLM's in one form, to standard error.

A line that belongs to a job bears its id and that of its trace. Passwords inside addresses are
masked. Tracebacks show frames, never the values of variables, which could be prompts; pydantic's
errors are told without their input for the same reason.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, Literal

import structlog
from structlog.typing import Processor

if TYPE_CHECKING:
    from uuid import UUID

_CREDENTIALS = re.compile(r"(\w+://)[^/\s@]*@")
#: Loggers that bring handlers of their own, which would write a second form.
_OWN_HANDLERS = ("vllm", "celery", "py.warnings")

_Event = MutableMapping[str, Any]


def configure(*, level: str, form: Literal["console", "json"]) -> None:
    """Decide how every log line of this process looks.

    Args:
        level: Least severe line: DEBUG, INFO, WARNING or ERROR.
        form: ``json`` is an object a line, for machines; ``console`` is for people.
    """
    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception,
        _mask,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *chain,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _renderer(form),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def adopt_libraries() -> None:
    """Let libraries that write lines by themselves write ours; after they were imported."""
    for name in _OWN_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def bind_job(job_id: UUID, trace_id: str | None) -> None:
    """Put a job's id, and its trace's, on every line that the calling task writes from now on.

    Args:
        job_id: The job.
        trace_id: Of its trace; None leaves it out.
    """
    if trace_id is None:
        structlog.contextvars.bind_contextvars(job_id=str(job_id))
    else:
        structlog.contextvars.bind_contextvars(job_id=str(job_id), trace_id=trace_id)


def _renderer(form: str) -> Processor:
    if form == "json":
        return structlog.processors.JSONRenderer(ensure_ascii=False)
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())


def _exception(_logger: Any, _method: str, event: _Event) -> _Event:
    given = event.pop("exc_info", None)
    if not given:
        return event
    if isinstance(given, BaseException):
        error: BaseException | None = given
    else:
        error = (given if isinstance(given, tuple) else sys.exc_info())[1]
    if error is not None:
        event["exception"] = _told(error)
    return event


def _told(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error)).rstrip()
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        errors = getattr(one, "errors", None)
        if type(one).__name__ == "ValidationError" and callable(errors):
            text = text.replace(str(one), _without_input(errors))
        one = one.__cause__ or one.__context__
    return text


def _without_input(errors: Any) -> str:
    faults = errors(include_input=False, include_context=False, include_url=False)
    return "; ".join(
        f"{'.'.join(str(part) for part in fault['loc'])}: {fault['type']}" for fault in faults
    )


def _mask(_logger: Any, _method: str, event: _Event) -> _Event:
    for key, value in event.items():
        if isinstance(value, str) and "://" in value:
            event[key] = _CREDENTIALS.sub(r"\1***@", value)
    return event
