"""JSON in Postgres, for values that its type jsonb refuses.

A jsonb column holds no NUL character, no half of a surrogate pair, no NaN and no infinity; models
do write them. Such a document is kept packed, as ``{"packed": "…"}``, and comes back as it was.
Every other is stored plainly, so that SQL can read it.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from pydantic import BaseModel

_PACKED = "packed"


def dump(value: Any) -> str:
    """Write JSON types as text that a jsonb column takes.

    Args:
        value: Dictionaries, lists, text, numbers, booleans, None.

    Returns:
        JSON, packed where it has to be.
    """
    try:
        data = orjson.dumps(value)
    except orjson.JSONEncodeError:  # half a surrogate pair, or a number of more than 64 bits
        return _pack(json.dumps(value))
    # orjson writes NaN and infinity as null, so a null may be a loss.
    if b"\\u0000" in data or b"null" in data:
        text = json.dumps(value)
        return text if _is_plain(text) else _pack(text)
    return data.decode()


def dump_model(model: BaseModel) -> str:
    """Write a pydantic model as text that a jsonb column takes.

    Args:
        model: Any model of ours.

    Returns:
        JSON, packed where it has to be.
    """
    try:
        text = model.model_dump_json()
    except ValueError:  # half a surrogate pair
        return _pack(json.dumps(model.model_dump(mode="json")))
    return dump_text(text)


def dump_text(text: str) -> str:
    """Write JSON that is text already as text that a jsonb column takes.

    Args:
        text: JSON.

    Returns:
        The same, packed where it has to be.
    """
    return text if _is_plain(text) else _pack(text)


def load(value: Any) -> Any:
    """Give back what `dump` or `dump_model` was given, as JSON types.

    Args:
        value: A jsonb column's value, as the driver read it.

    Returns:
        The document.
    """
    if isinstance(value, dict) and value.keys() == {_PACKED}:
        return json.loads(zlib.decompress(base64.b64decode(value[_PACKED])))
    return value


def clean(text: str) -> str:
    """Make text fit for a text column; what does not fit becomes U+FFFD.

    Args:
        text: Any string.

    Returns:
        The same, without NUL characters and halves of surrogate pairs.
    """
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class _Unstorable(Exception):  # noqa: N818  raised and caught here, to leave the parser early
    pass


def _refuse(_constant: str) -> None:
    raise _Unstorable


def _is_plain(text: str) -> bool:
    """Whether jsonb takes it. Looks closely only at what may be refused."""
    escape = "\\u0000" in text or "\\ud" in text
    if not escape and "NaN" not in text and "Infinity" not in text:
        return True
    try:
        found = json.loads(text, parse_constant=_refuse)
    except _Unstorable:
        return False
    return not escape or _all_text_fits(found)


def _all_text_fits(value: Any) -> bool:
    if isinstance(value, str):
        try:
            return "\x00" not in value and bool(value.encode() or True)
        except UnicodeEncodeError:
            return False
    if isinstance(value, list):
        return all(map(_all_text_fits, value))
    if isinstance(value, dict):
        return all(map(_all_text_fits, value)) and all(map(_all_text_fits, value.values()))
    return True


def _pack(text: str) -> str:
    packed = base64.b64encode(zlib.compress(text.encode())).decode()
    return orjson.dumps({_PACKED: packed}).decode()
