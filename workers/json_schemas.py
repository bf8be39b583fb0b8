"""JSON schemas: whether something is one, and why a text does not fit one."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import orjson
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from referencing import Registry

from schema.errors import InvalidRequestError, shown

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_COMPILED = 64
_MESSAGE_CHARS = 300


def check_schema(schema: object, *, field: str = "schema") -> None:
    """Refuse what is no JSON schema.

    Args:
        schema: Parsed JSON.
        field: Where it stood, for the message.

    Raises:
        InvalidRequestError: It is no schema, or points outside of itself.
    """
    _validator(schema, field)


_validators: OrderedDict[bytes, Validator] = OrderedDict()


def _validator(schema: object, field: str = "schema") -> Validator:
    if not isinstance(schema, (dict, bool)):
        msg = f"must be a JSON schema, not {shown(schema)}"
        raise InvalidRequestError(msg, field=field, value=schema)
    name = orjson.dumps(schema, option=orjson.OPT_SORT_KEYS)
    if (known := _validators.get(name)) is not None:
        _validators.move_to_end(name)
        return known
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as exc:
        at = "/".join(str(part) for part in exc.absolute_path)
        msg = f"is not a JSON schema: {_cut(exc.message)}" + (f" (at {at})" if at else "")
        raise InvalidRequestError(msg, field=field) from None
    # An empty registry: a reference to another document must not make a worker fetch it.
    made: Validator = kind(schema, registry=Registry())
    _validators[name] = made
    while len(_validators) > _COMPILED:
        _validators.popitem(last=False)
    return made


def fault_in(schema: dict[str, Any] | bool, text: str) -> str | None:
    """Return why a text does not fit a schema, or None when it does.

    Nothing bounds how long it takes: that is up to the schema; see `SchemaChecker`.

    Args:
        schema: One that `check_schema` passes.
        text: Should be JSON.

    Raises:
        Unresolvable: The schema refers to what it does not hold.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        return f"it is not JSON ({exc})"
    try:
        error = best_match(_validator(schema).iter_errors(value))
    except RecursionError:
        return "it is nested too deeply to be checked"
    if error is None:
        return None
    return f"{_cut(error.message)} (at {error.json_path})"


def _cut(text: str) -> str:
    """Return a validator's message, cut: it may hold all of the answer."""
    return text if len(text) <= _MESSAGE_CHARS else f"{text[:_MESSAGE_CHARS]}…"
