"""Parquet files as batches: rows in, answers out, a thousand or so at a time.

A row of the input either is a whole request, with the columns ``custom_id``, ``method``, ``url``
and ``body`` (JSON text or a struct), or says in columns what to ask: ``prompt`` or ``messages``,
and beside it any of ``url``, ``system``, ``model`` and the sampling fields of `SAMPLED`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from schema.errors import ConfigurationError, InvalidFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDING = ".parquet"
#: Columns that go into the body of a chat under their own names.
SAMPLED = ("max_tokens", "temperature", "top_p", "seed", "stop")
_CHAT = "/v1/chat/completions"
#: Endpoints that take the text of the column ``prompt`` as it is, and under which name.
_PLAIN = {"/v1/completions": "prompt", "/v1/embeddings": "input"}
_AT_ONCE = 1024
#: Column of an output that holds the line which a JSONL file would.
LINE = "line"


def pyarrow(module: str) -> Any:
    """Return a module of pyarrow.

    Args:
        module: Its name, such as ``pyarrow.parquet``.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        msg = "Parquet and Arrow need the package pyarrow: pip install 'promptmill[etl]'"
        raise ConfigurationError(msg) from None


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of a Parquet file as lines of a batch file.

    Args:
        path: The file.

    Yields:
        Row, counted from 1, and JSON.

    Raises:
        InvalidFileError: It has none of the columns that a request can be made of.
        ValueError: It is no Parquet file, or a damaged one.
    """
    number = 0
    with pyarrow("pyarrow.parquet").ParquetFile(path) as file:
        _check(path, file.schema_arrow.names)
        for group in file.iter_batches(batch_size=_AT_ONCE):
            for row in group.to_pylist():
                number += 1
                yield number, orjson.dumps(_request(number, _decoded(row)), default=str)


def _decoded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its bytes as text: many writers mark no column as such."""
    if not any(isinstance(value, bytes) for value in row.values()):
        return row
    try:
        return {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in row.items()
        }
    except UnicodeDecodeError:
        rest = {name: value for name, value in row.items() if not isinstance(value, bytes)}
        return {**rest, "body": "bytes that are not UTF-8"}


def _check(path: str, names: list[str]) -> None:
    if not {"body", "prompt", "messages"} & set(names):
        known = ", ".join(names[:12])
        msg = f"has no column body, prompt or messages; it has {known}"
        raise InvalidFileError(msg, path=path)


def _request(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a line of OpenAI's; what is wrong with it is said when the line is read."""
    custom_id = row.get("custom_id")
    url = row.get("url") or _CHAT
    line: dict[str, Any] = {
        # Keys of tables are numbers more often than text.
        "custom_id": _name(number if custom_id is None else custom_id, custom_id is None),
        "method": row.get("method") or "POST",
        "url": url,
    }
    if "body" in row:
        body = row["body"]
        return {**line, "body": _parsed(body) if isinstance(body, str) else _without_none(body)}
    given = {name: row[name] for name in ("model", *SAMPLED) if row.get(name) is not None}
    if row.get("messages") is None and not _is_asked(row.get("prompt")):
        # Not a request without a prompt, which a model would answer with something.
        return {**line, "body": "an empty prompt"}  # refused as a body that is no object
    if (plain := _PLAIN.get(url)) is not None and row.get("messages") is None:
        return {**line, "body": {plain: row["prompt"], **given}}
    messages = _without_none(row.get("messages"))
    if messages is None:
        messages = [{"role": "user", "content": row["prompt"]}]
    if row.get("system") is not None:
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return {**line, "body": {"messages": messages, **given}}


def _name(value: Any, made: bool) -> Any:
    if made:
        return f"row-{value}"
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_asked(prompt: object) -> bool:
    return prompt is not None and not (isinstance(prompt, str) and not prompt.strip())


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text  # refused as a body that is no object


def _without_none(value: Any) -> Any:
    # A struct has all of its fields in every row; those that are null were not given.
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def former_lines(path: str) -> Iterator[bytes]:
    """Yield the lines that an output of ours was made of.

    Args:
        path: A Parquet file that `write` made.

    Raises:
        InvalidFileError: It was made by something else.
    """
    with pyarrow("pyarrow.parquet").ParquetFile(path) as file:
        if LINE not in file.schema_arrow.names:
            msg = f"has no column {LINE}: it is no output of a batch run"
            raise InvalidFileError(msg, path=path)
        for group in file.iter_batches(batch_size=_AT_ONCE, columns=[LINE]):
            for line in group.column(0).to_pylist():
                yield f"{line}\n".encode()


def write(source: Path, target: Path) -> None:
    """Write output lines as a Parquet file.

    Args:
        source: A file of lines as batch runs write them.
        target: The file to be made.
    """
    arrow = pyarrow("pyarrow")
    schema = _schema(arrow)
    writer = pyarrow("pyarrow.parquet").ParquetWriter(target, schema, compression="zstd")
    with source.open("rb") as file, writer:
        rows: list[dict[str, Any]] = []
        for raw in file:
            rows.append(columns_of(raw))
            if len(rows) >= _AT_ONCE:
                writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
                rows = []
        writer.write_table(arrow.Table.from_pylist(rows, schema=schema))


def _schema(arrow: Any) -> Any:
    text, number, real = arrow.string(), arrow.int64(), arrow.float64()
    return arrow.schema(
        [
            ("custom_id", text),
            ("status_code", number),
            ("answer", text),
            ("finish_reason", text),
            ("error", text),
            ("provenance", text),
            ("similarity", real),
            ("source_answer_id", text),
            ("prompt_tokens", number),
            ("completion_tokens", number),
            ("seconds", real),
            ("job_id", text),
            (LINE, text),
        ]
    )


def columns_of(raw: bytes) -> dict[str, Any]:
    """Return what an output line says, by column.

    Args:
        raw: The line.
    """
    line = orjson.loads(raw)
    response, own = line["response"] or {}, line.get("promptmill") or {}
    body = response.get("body") or {}
    choice = (body.get("choices") or [{}])[0]
    tokens = own.get("tokens") or body.get("usage") or {}
    return {
        "custom_id": line["custom_id"],
        "status_code": response.get("status_code"),
        "answer": (choice.get("message") or {}).get("content") or choice.get("text"),
        "finish_reason": choice.get("finish_reason"),
        "error": None if line["error"] is None else line["error"].get("message"),
        "provenance": own.get("provenance"),
        "similarity": own.get("similarity"),
        "source_answer_id": own.get("source_answer_id"),
        "prompt_tokens": tokens.get("prompt_tokens"),
        "completion_tokens": tokens.get("completion_tokens"),
        "seconds": (own.get("processing_time") or {}).get("total"),
        "job_id": own.get("job_id"),
        LINE: raw.rstrip(b"\n").decode(),
    }
