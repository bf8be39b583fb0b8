"""OpenAI's batch format: a request a line in, an answer a line out, as vLLM's `run_batch` has it.

Reading is by line and keeps nothing but a digest of each ``custom_id``, so that a file of any size
is read in little memory. A line that is wrong is returned as a `BadLine`; it never stops the rest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4, uuid5

import orjson

from schema.errors import shown
from schema.jobs import OPENAI_URLS, JobState, Provenance
from schema.refusal import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from schema.jobs import JobError, JobResult

#: Longest line read; a longer one is refused and passed over.
MAX_LINE_BYTES = 16 * 1024 * 1024
_FIELDS = ("custom_id", "method", "url", "body")
_MAX_ID_CHARS = 512
_OTHER_KINDS = {
    b"\x1f\x8b": ("compressed by gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", ".zst"),
    b"PAR1": ("a Parquet file", ".parquet"),
}
_BOM = b"\xef\xbb\xbf"
# HTTP's own words for jobs that ended without an answer and without a status of vLLM's.
_STATUS_CODES = {JobState.CANCELLED: 499, JobState.EXPIRED: 408, JobState.FAILED: 500}


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request of a batch file."""

    number: int  # line in the file, counted from 1
    custom_id: str
    url: str
    body: dict[str, Any]
    size: int = 0  # bytes of the line


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that is no request, and why."""

    number: int  # line in the file, counted from 1
    message: str
    custom_id: str | None = None  # as far as it can be read
    param: str | None = None  # the field that is wrong
    is_object: bool = True  # whether it was a JSON object at all


class _BadLineError(Exception):
    def __init__(self, message: str, param: str | None = None, *, is_object: bool = True) -> None:
        super().__init__(message)
        self.param = param
        self.is_object = is_object


def read_lines(
    file: BinaryIO, *, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines of a file that are not blank.

    Args:
        file: Open for reading bytes.
        max_bytes: Longest line returned.

    Yields:
        Line number, counted from 1, and the line without its end; None for one that is too long.
    """
    number = 0
    while raw := file.readline(max_bytes + 2):
        number += 1
        if len(raw) == max_bytes + 2 and not raw.endswith(b"\n"):
            while (more := file.readline(1 << 20)) and not more.endswith(b"\n"):
                pass
        if len(raw.removesuffix(b"\n")) > max_bytes:
            yield number, None
            continue
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if line := line.strip():
            yield number, line


class BatchParser:
    """Turns lines into requests, remembering the ids that it has seen.

    Args:
        max_bytes: What `read_lines` was told, for the message.
    """

    def __init__(self, *, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._seen: set[int] = set()

    def parse(self, number: int, line: bytes | None) -> BatchLine | BadLine:
        """Read one line.

        Args:
            number: Its place, counted from 1.
            line: Its bytes; None when it was too long to be read.

        Returns:
            The request, or what is wrong with it.
        """
        custom_id: str | None = None
        try:
            value = self._object(line)
            custom_id = _custom_id(value)
            self._first_time(custom_id)
            url, body = _rest(value)
        except _BadLineError as exc:
            return BadLine(
                number=number,
                message=f"line {number}: {exc}",
                custom_id=custom_id,
                param=exc.param,
                is_object=exc.is_object,
            )
        return BatchLine(
            number=number, custom_id=custom_id, url=url, body=body, size=len(line or b"")
        )

    def _first_time(self, custom_id: str) -> None:
        digest = id_digest(custom_id)
        if digest in self._seen:
            msg = f"custom_id {shown(custom_id)} came before; each may come once"
            raise _BadLineError(msg, "custom_id")
        self._seen.add(digest)

    def _object(self, line: bytes | None) -> dict[str, Any]:
        if line is None:
            msg = f"is longer than {self._max_bytes:,} bytes"
            raise _BadLineError(msg)
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            raise _BadLineError(_not_json(line, exc), is_object=False) from None
        if not isinstance(value, dict):
            msg = f"must be a JSON object, not {shown(value)}"
            raise _BadLineError(msg, is_object=False)
        return value


def _not_json(line: bytes, exc: orjson.JSONDecodeError) -> str:
    for mark, (kind, ending) in _OTHER_KINDS.items():
        if line.startswith(mark):
            return f"is {kind}; give it a name that ends in {ending}, or unpack it first"
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return f"is not valid UTF-8 ({wrong.reason} at byte {wrong.start})"
    if b"\x00" in line:
        return f"holds a NUL byte at position {line.index(0)}"
    return f"is not JSON ({exc})"


def _custom_id(value: dict[str, Any]) -> str:
    if "custom_id" not in value:
        raise _BadLineError(_missing("custom_id", value), "custom_id")
    custom_id = value["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_CHARS:
        msg = f"custom_id must be text of 1 to {_MAX_ID_CHARS} characters, not {shown(custom_id)}"
        raise _BadLineError(msg, "custom_id")
    if "\x00" in custom_id:
        msg = "custom_id holds a NUL character; remove it"
        raise _BadLineError(msg, "custom_id")
    return custom_id


def _rest(value: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for field in _FIELDS:
        if field not in value:
            raise _BadLineError(_missing(field, value), field)
    if value["method"] != "POST":
        msg = f"method must be 'POST', not {shown(value['method'])}"
        raise _BadLineError(msg, "method")
    url = value["url"]
    if not isinstance(url, str) or url not in OPENAI_URLS:
        hint = did_you_mean(str(url), OPENAI_URLS)
        msg = f"url must be one of {', '.join(OPENAI_URLS)}, not {shown(url)}{hint}"
        raise _BadLineError(msg, "url")
    if not isinstance(value["body"], dict):
        msg = f"body must be an object, not {shown(value['body'])}"
        raise _BadLineError(msg, "body")
    return url, value["body"]


def _missing(field: str, value: dict[str, Any]) -> str:
    close = did_you_mean(field, [key for key in value if key not in _FIELDS])
    return f"the field {field} is missing" + close.replace("did you mean", "is it written as")


def id_digest(custom_id: str) -> int:
    """Return 64 bits that stand for a ``custom_id``: a million of them take 70 MB, not 200.

    Two different ids of a million meet once in about 37 million files.

    Args:
        custom_id: The row's name.
    """
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest())


def output_line(
    result: JobResult,
    *,
    custom_id: str | None = None,
    twin: bool = False,
    asked: int | None = None,
) -> bytes:
    """Return the output line of a row whose job is over, newline included.

    Args:
        result: Its outcome.
        custom_id: Name of the row, where it is not the job's own.
        twin: Whether the job was another row's, with the same request.
        asked: 64 bits of a digest of what the row asks, by which a changed row is known.

    Returns:
        An object with ``id``, ``custom_id``, ``response`` and ``error`` as vLLM's `run_batch`
        writes it, and ``promptmill``: how the answer came about. Of a row without an answer,
        ``response.body`` and ``error`` say why, each as OpenAI has it in that place.
    """
    # As OpenAI's, the id of a line is that line's alone.
    name = (uuid5(result.job_id, custom_id or "") if twin else result.job_id).hex
    done = result.status is JobState.DONE
    error = None if done else _error_body(result)
    code = 200 if done else (error or {}).get("error", {}).get("code") or 500
    return _line(
        name=name,
        custom_id=custom_id or result.custom_id,
        status_code=code,
        body=result.body if done else error,
        error=error,
        own=_provenance(result, twin=twin, asked=asked),
    )


def error_line(bad: BadLine) -> bytes:
    """Return the output line of an input line that could not become a job, newline included.

    Args:
        bad: The line and what is wrong with it.
    """
    return _line(
        name=uuid4().hex,
        custom_id=bad.custom_id,
        status_code=400,
        body=(error := _openai_error(bad.message, "BadRequestError", bad.param, 400)),
        error=error,
        own={"line": bad.number},
    )


def _line(
    *,
    name: str,
    custom_id: str | None,
    status_code: int,
    body: dict[str, Any] | None,
    error: dict[str, Any] | None,
    own: dict[str, Any],
) -> bytes:
    response = {
        "status_code": status_code,
        "request_id": f"promptmill-batch-{name}",
        "body": body,
    }
    value = {
        "id": f"promptmill-{name}",
        "custom_id": custom_id,
        "response": response,
        "error": error and {**_code_and_message(error), **error},
        "promptmill": own,
    }
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def _code_and_message(error: dict[str, Any]) -> dict[str, Any]:
    # OpenAI's own `error` of a line is these two; vLLM's is the whole body of the response.
    return {"code": error["error"].get("type"), "message": error["error"].get("message")}


def _error_body(result: JobResult) -> dict[str, Any]:
    error: JobError | None = result.error
    if error is None:
        message = f"the job was {result.status.value}"
        return _openai_error(message, "JobError", None, _STATUS_CODES.get(result.status, 500))
    if error.body is not None and isinstance(error.body.get("error"), dict):
        return error.body
    default = 400 if error.type == "InvalidRequestError" else _STATUS_CODES.get(result.status, 500)
    code = error.status_code or default
    return _openai_error(error.message, error.type, error.field, code)


def _openai_error(message: str, kind: str, param: str | None, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_TOLD = (
    "provenance",
    "cached",
    "similarity",
    "source_answer_id",
    "answer_id",
    "tokens",
    "engine_s",
    "processing_time",
    "schema_retry",
)


def _provenance(result: JobResult, *, twin: bool, asked: int | None) -> dict[str, Any]:
    found = {name: result.metadata.get(name) for name in _TOLD}
    if twin:
        found |= {"provenance": Provenance.COALESCED.value, "source_answer_id": found["answer_id"]}
    return {
        "job_id": str(result.job_id),
        **{name: value for name, value in found.items() if value is not None},
        **({} if asked is None else {"asked": f"{asked:016x}"}),
    }
