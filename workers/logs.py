"""Log lines: ours, Celery's and vLLM's in one form, to standard error.

A line that belongs to a job bears its id and that of its trace. Passwords inside addresses are
masked. An equal warning is written once a minute: while a server is down, whatever waits for it
says so every second. Tracebacks show frames, never the values of variables, which could be
prompts; pydantic's errors are told without their input for the same reason.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Literal

import structlog
from structlog.typing import Processor

if TYPE_CHECKING:
    from uuid import UUID

# To the last @ of a word: a password that is not percent-encoded may hold any sign.
_CREDENTIALS = re.compile(r"(\w+://)\S*@")
_IN_QUERY = re.compile(r"([?&](?:ssl_?)?password=)[^&\s]*")
#: Loggers that bring handlers of their own, which would write a second form.
_OWN_HANDLERS = ("vllm", "celery", "py.warnings")

#: Celery's two lines a message, which say less than what is said of jobs.
_CHATTY = ("celery.worker.strategy", "celery.app.trace")

_Event = MutableMapping[str, Any]

#: Seconds between two equal warnings.
_AGAIN_S = 60.0
#: Warnings remembered; more at a time are few of a kind.
_REMEMBERED = 256


def configure(*, level: str, form: Literal["console", "json"], worker: str | None = None) -> None:
    """Decide how every log line of this process looks.

    Args:
        level: Least severe line: DEBUG, INFO, WARNING or ERROR.
        form: ``json`` is an object a line, for machines; ``console`` is for people.
        worker: Name that lines of JSON bear, for those of several may come together.
    """
    chain = _chain()
    if worker is not None and form == "json":
        chain.append(lambda _logger, _method, event: {**event, "worker": worker})
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *chain,
            OnceAMinute(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(form, chain))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel("WARNING" if level == "INFO" else level)


def json_formatter() -> logging.Formatter:
    """Return what makes JSON of lines of vLLM's processes, as `workers/vllm_logging.json` asks.

    Those processes are vLLM's own, and know nothing of `configure`.
    """
    return _formatter("json", _chain())


class OnceAMinute:
    """Drops a warning that is equal to one of the last minute; the next says how many were dropped.

    Equal means in all it says: one that names a job is another for the next job.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: OrderedDict[tuple[Any, ...], tuple[float, int]] = OrderedDict()

    def __call__(self, _logger: Any, _method: str, event: _Event) -> _Event:
        """Return the event, or raise `structlog.DropEvent`."""
        if event.get("level") != "warning":
            return event
        said = tuple(sorted((key, str(event[key])) for key in event if key != "timestamp"))
        now = self._clock()
        written_at, dropped = self._seen.get(said, (float("-inf"), 0))
        if now - written_at < _AGAIN_S:
            self._seen[said] = (written_at, dropped + 1)
            raise structlog.DropEvent
        self._seen[said] = (now, 0)
        self._seen.move_to_end(said)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        if dropped:
            event["repeated"] = dropped
        return event


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


def _chain() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _process,
        _exception,
        _mask,
    ]


def _formatter(form: str, chain: list[Processor]) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=chain,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _renderer(form),
        ],
    )


def _process(_logger: Any, _method: str, event: _Event) -> _Event:
    """Name the process of vLLM's that a line is from, such as EngineCore."""
    name = getattr(event.get("_record"), "vllm_process_name", "MainProcess")
    if name != "MainProcess":
        event["process"] = name
    return event


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
            event[key] = _IN_QUERY.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", value))
    return event
