"""Answers that must be JSON of a given shape: which schema a request names, and whether one fits.

vLLM constrains the model while it generates. What is left are answers that were cut at their token
limit, and what its grammars do not know of JSON Schema, such as bounds and patterns.
"""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import orjson
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from schema.errors import InvalidRequestError, shown
from schema.jobs import OpenAIRequest, PromptRequest

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

    from schema.jobs import Completion

_COMPILED = 64
_SEEDS = 2**31
#: Temperature of the second try of a greedy request: without one, another seed changes nothing.
SECOND_TEMPERATURE = 0.5


def schema_of(request: PromptRequest | OpenAIRequest) -> dict[str, Any] | bool | None:
    """Return the JSON schema that a request's answers must fit, or None when it names none.

    Args:
        request: What is asked.

    Raises:
        InvalidRequestError: What should be a schema is none.
    """
    if isinstance(request, PromptRequest):
        return _of_constraint(request.sampling.structured_outputs, "sampling.structured_outputs")
    form = request.body.get("response_format")
    if isinstance(form, dict):
        if form.get("type") == "json_object":
            return {"type": "object"}
        if form.get("type") == "json_schema":
            named = form.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            return None if schema is None else _checked(schema, "body.response_format.json_schema")
    return _of_constraint(request.body.get("structured_outputs"), "body.structured_outputs")


def _of_constraint(constraint: object, field: str) -> dict[str, Any] | bool | None:
    if not isinstance(constraint, dict):
        return None
    if constraint.get("json_object"):
        return {"type": "object"}
    schema = constraint.get("json")
    return None if schema is None else _checked(schema, f"{field}.json")


def _checked(schema: object, field: str) -> dict[str, Any] | bool:
    if isinstance(schema, str):  # as vLLM takes it too
        try:
            schema = json.loads(schema)
        except ValueError as exc:
            msg = f"is not JSON ({exc})"
            raise InvalidRequestError(msg, field=field, value=schema) from None
    check_schema(schema, field=field)
    return schema  # type: ignore[return-value]  # it was checked


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
        msg = f"is not a JSON schema: {shown_text(exc.message)}" + (f" (at {at})" if at else "")
        raise InvalidRequestError(msg, field=field) from None
    # An empty registry: a reference to another document must not make a worker fetch it.
    made: Validator = kind(schema, registry=Registry())
    _validators[name] = made
    while len(_validators) > _COMPILED:
        _validators.popitem(last=False)
    return made


def shown_text(text: str, most: int = 300) -> str:
    """Return a validator's message, cut: it may hold all of the answer.

    Args:
        text: The message.
        most: Characters kept.
    """
    return text if len(text) <= most else f"{text[:most]}…"


def fault_of(schema: dict[str, Any] | bool, outputs: list[Completion]) -> str | None:
    """Return why answers do not fit a schema, or None when all of them do.

    Args:
        schema: As `schema_of` returned it.
        outputs: The answers. One without text, such as a tool call, is not held to the schema.

    Raises:
        InvalidRequestError: The schema refers to what it does not hold.
    """
    for output in outputs:
        if not output.text and output.finish_reason == "tool_calls":
            continue
        if (fault := _fault(schema, output.text)) is None:
            continue
        which = f"answer {output.index} " if len(outputs) > 1 else "the answer "
        cut = "; it was cut at its token limit" if output.finish_reason == "length" else ""
        return f"{which}does not fit the schema: {fault}{cut}"
    return None


def _fault(schema: dict[str, Any] | bool, text: str) -> str | None:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        return f"it is not JSON ({exc})"
    try:
        error = best_match(_validator(schema).iter_errors(value))
    except Unresolvable as exc:
        msg = f"refers to what is not in it ({exc})"
        raise InvalidRequestError(msg, field="schema") from None
    except RecursionError:
        return "it is nested too deeply to be checked"
    if error is None:
        return None
    return f"{shown_text(error.message)} (at {error.json_path})"


def second_try(request: PromptRequest | OpenAIRequest) -> PromptRequest | OpenAIRequest:
    """Return a request with another seed, and for a greedy one with a temperature.

    Args:
        request: Whose answer did not fit.
    """
    if isinstance(request, PromptRequest):
        changed = _reseeded(request.sampling.seed, request.sampling.temperature)
        return request.model_copy(update={"sampling": request.sampling.model_copy(update=changed)})
    changed = _reseeded(request.body.get("seed"), request.body.get("temperature"))
    return request.model_copy(update={"body": {**request.body, **changed}})


def _reseeded(seed: object, temperature: object) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    greedy = temperature is not None and temperature == 0
    if isinstance(seed, int):
        changed["seed"] = seed + 1 if seed < _SEEDS else seed - 1
    else:
        # Greedy requests are repeatable, and so is their second try.
        changed["seed"] = 1 if greedy else random.randrange(_SEEDS)  # noqa: S311  no secret
    if greedy:
        changed["temperature"] = SECOND_TEMPERATURE
    return changed


def is_repeatable(request: PromptRequest | OpenAIRequest) -> bool:
    """Whether a request gives the same answer again: it is greedy, or has a seed.

    Args:
        request: What is asked.
    """
    if isinstance(request, PromptRequest):
        return request.sampling.temperature == 0 or request.sampling.seed is not None
    return request.body.get("temperature") == 0 or request.body.get("seed") is not None
