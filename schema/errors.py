"""Every error promptmill raises, in one tree.

PromptmillError
├── CallerError                    the caller's fault: trying again cannot help
│   ├── InvalidRequestError        a field holds a value that cannot be accepted
│   │   └── UnknownModelError      no worker of this deployment serves that model
│   ├── InvalidFileError           a batch file, or one line of it, cannot be read or written
│   ├── IdempotencyConflictError   the key was used before, with another request
│   ├── JobNotFoundError           no such job in this namespace
│   └── ConfigurationError         a setting is missing or wrong
├── QueueFullError                 the queue is at its bound; later is better
├── ResultTimeoutError             the result did not come in time; the job goes on
└── ServiceError                   promptmill's fault: trying again can help
    ├── DatabaseUnavailableError   Postgres cannot be reached
    ├── BrokerUnavailableError     Redis cannot be reached
    ├── StackError                 the embedded servers did not start or died
    ├── LeaseLostError             another worker holds the job now
    ├── EngineFailedError          vLLM failed on one request
    │   └── EngineGoneError        vLLM's engine is dead: the process must be replaced
    ├── MessageFormatError         a queue message is not one of ours
    └── EnrichmentError            an enhancement failed; see workers.enrich.errors
"""

from __future__ import annotations

_SHOWN_VALUE_CHARS = 120


def shown(value: object) -> str:
    """Return ``repr(value)`` cut to a length fit for a message.

    Args:
        value: Anything that has a repr.

    Returns:
        At most about 120 characters.
    """
    text = repr(value[: _SHOWN_VALUE_CHARS * 2] if isinstance(value, (str, bytes)) else value)
    if len(text) > _SHOWN_VALUE_CHARS:
        return f"{text[:_SHOWN_VALUE_CHARS]}…"
    return text


class PromptmillError(Exception):
    """The root of every error that promptmill raises on purpose."""


class CallerError(PromptmillError):
    """The request or the set-up was wrong; the same call would fail again."""


class InvalidRequestError(CallerError):
    """A field holds a value that cannot be accepted.

    Args:
        message: What was wrong and what would be right.
        field: Dotted path of the field, such as ``sampling.temperature``.
        value: The offending value; shown shortened, never in full.
    """

    def __init__(self, message: str, *, field: str | None = None, value: object = None) -> None:
        self.field = field
        self.value = None if value is None else shown(value)
        super().__init__(f"{field}: {message}" if field else message)


class UnknownModelError(InvalidRequestError):
    """No worker serves the model that the job names."""


class InvalidFileError(CallerError):
    """A file, or one line of it, cannot be read or written.

    Args:
        message: What was wrong and what would be right.
        path: The file.
        line: Line number, counted from 1.
    """

    def __init__(self, message: str, *, path: object = None, line: int | None = None) -> None:
        self.path = None if path is None else str(path)
        self.line = line
        place = ":".join(str(part) for part in (self.path, line) if part is not None)
        super().__init__(f"{place}: {message}" if place else message)


class IdempotencyConflictError(CallerError):
    """The idempotency key was used before, with a different request."""


class JobNotFoundError(CallerError):
    """No job with that id lives in this namespace."""


class ConfigurationError(CallerError):
    """A setting is missing or has a value that cannot be used."""


class QueueFullError(PromptmillError):
    """The queue is at its bound; nothing was enqueued."""


class ResultTimeoutError(PromptmillError, TimeoutError):
    """The result did not come in time; the job itself goes on."""


class ServiceError(PromptmillError):
    """Something of ours failed; trying again can help."""


class DatabaseUnavailableError(ServiceError):
    """Postgres cannot be reached or broke the connection."""


class BrokerUnavailableError(ServiceError):
    """Redis cannot be reached or broke the connection."""


class StackError(ServiceError):
    """The embedded servers did not start, or died."""


class LeaseLostError(ServiceError):
    """Another worker holds the job now: what this one made must not be written."""


class EngineFailedError(ServiceError):
    """vLLM failed on one request; the engine itself goes on."""


class EngineGoneError(EngineFailedError):
    """vLLM's engine is dead: the worker process must be replaced."""


class MessageFormatError(ServiceError):
    """A queue message is not in a form that this version can read."""
