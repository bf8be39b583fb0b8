"""What a queue item must look like before Celery sees it.

Celery and kombu trust what they read: an item that is not JSON, lacks a property or holds
a list where they want a name raises in the middle of the consumer, which ends the worker
or makes it reconnect for ever. So everything they will touch is checked here first, from
the outside in: size, text, JSON, kombu's envelope, Celery's headers (message protocol 2),
and the body.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from kombu.utils.json import loads
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from schema.errors import MessageFormatError

DEFAULT_MAX_BYTES = 16 * 1024 * 1024

#: Queues that carry Celery's own traffic, not tasks: replies to remote control, events.
_CONTROL_QUEUE_ENDS = (".pidbox",)
_CONTROL_QUEUE_STARTS = ("celeryev.",)


def _printable(value: Any) -> Any:
    # A NUL or half a surrogate pair would fail later, in a key or a column.
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("must be printable text")
    return value


Text = Annotated[str, Field(max_length=512), BeforeValidator(_printable)]
Name = Annotated[Text, Field(min_length=1)]
Utf8 = Literal["utf-8", "UTF-8", "utf8"]
Json = Literal["application/json"]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)


class _DeliveryInfo(_Part):
    exchange: Text
    routing_key: Text
    priority: int | None = Field(None, ge=0, le=255)


class _Properties(_Part):
    delivery_tag: Name
    delivery_info: _DeliveryInfo
    body_encoding: Literal["base64"] | None = None
    priority: int | None = Field(None, ge=0, le=255)
    correlation_id: Text | None = None
    reply_to: Text | None = None


class _Envelope(_Part):
    body: str
    content_type: Json = Field(alias="content-type")
    content_encoding: Utf8 = Field(alias="content-encoding")
    properties: _Properties
    headers: dict[str, Any]


class _TaskHeaders(_Part):
    task: Name
    id: Name
    # A compressed body may hold any amount of anything.
    compression: None = None
    root_id: Text | None = None
    parent_id: Text | None = None
    group: Text | None = None
    shadow: Text | None = None
    origin: Text | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    # Celery would hold the message for ever, drop it unseen, or drop it half done. A job has a
    # deadline of its own.
    eta: None = None
    expires: None = None
    timelimit: list[None] | None = Field(None, min_length=2, max_length=2)
    retries: int | None = Field(None, ge=0)
    ignore_result: bool | None = None
    replaced_task_nesting: int | None = None
    stamped_headers: list[Name] | None = None
    stamps: dict[str, Any] | None = None


class _Signature(_Part):  # type: ignore[no-redef]  # the plugin takes an alias for a name
    task: Name
    # pydantic's own names would be in the way.
    its_args: list[Any] = Field(alias="args", default_factory=list)
    its_kwargs: dict[str, Any] = Field(alias="kwargs", default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)


class _Embed(_Part):
    # Anything more would overwrite the request's own fields in Celery's tracer.
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    # A canvas: what the worker sends afterwards, in the name of the sender.
    callbacks: list[_Signature] | None = None
    errbacks: list[_Signature] | None = None
    chain: list[_Signature] | None = None
    chord: _Signature | None = None


_TASK_BODY: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        tuple[list[Any], dict[str, Any], _Embed | None],
        Field(strict=False),
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ]
)


def is_task_queue(queue: str) -> bool:
    """Say whether the queue named `queue` carries tasks, and not Celery's own traffic."""
    return not (queue.endswith(_CONTROL_QUEUE_ENDS) or queue.startswith(_CONTROL_QUEUE_STARTS))


def check_item(raw: bytes, queue: str, *, max_bytes: int) -> dict[str, Any]:
    """Return a queue item as the message it is.

    Args:
        raw: the item as it was in the list.
        queue: the queue it was read from.
        max_bytes: the size beyond which it is not even parsed.

    Raises:
        MessageFormatError: it cannot be handed to Celery. The text says what is wrong with
            it, naming the field but showing no content.
    """
    if len(raw) > max_bytes:
        raise MessageFormatError(f"too large: {len(raw)} bytes, at most {max_bytes} are accepted")
    try:
        payload = loads(raw.decode())
    except UnicodeDecodeError as exc:
        raise MessageFormatError(f"not UTF-8: {exc.reason} at byte {exc.start}") from exc
    except Exception as exc:  # kombu's decoders raise anything, recursion included
        raise MessageFormatError(f"not JSON: {type(exc).__name__}") from exc
    return check_message(payload, is_task=is_task_queue(queue))


def check_message(payload: Any, *, is_task: bool) -> dict[str, Any]:
    """Return a parsed message if it can be handed to Celery; see `check_item`.

    Args:
        payload: the message as kombu's JSON decoder made it.
        is_task: whether it must be a task, and not only a message.

    Raises:
        MessageFormatError: it cannot.
    """
    try:
        envelope = _Envelope.model_validate(payload)
        if is_task:
            _TaskHeaders.model_validate(envelope.headers)
    except ValidationError as exc:
        raise MessageFormatError(f"not a message: {_first(exc)}") from exc
    body = envelope.body
    try:
        data = base64.b64decode(body) if envelope.properties.body_encoding else body.encode()
    except ValueError as exc:
        raise MessageFormatError("not a message: body: not base64") from exc
    if is_task:
        _check_task_body(data)
    return payload


def _check_task_body(data: bytes) -> None:
    try:
        _TASK_BODY.validate_python(loads(data))
    except ValidationError as exc:
        raise MessageFormatError(f"not a task: body {_first(exc)}") from exc
    except Exception as exc:
        raise MessageFormatError(f"not a task: body: not JSON: {type(exc).__name__}") from exc


def _first(exc: ValidationError) -> str:
    error = exc.errors(include_input=False, include_url=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in error['loc']) or 'it'}: {error['msg']}"
