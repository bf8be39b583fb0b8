"""Answers that must be JSON of a given shape: which schema a request names, and whether one fits.

vLLM constrains the model while it generates. What is left are answers that were cut at their token
limit, and what its grammars do not know of JSON Schema, such as bounds and patterns.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from schema.errors import InvalidRequestError
from schema.jobs import OpenAIRequest, PromptRequest
from workers.json_schemas import check_schema

if TYPE_CHECKING:
    from schema.jobs import Completion
    from workers.schema_checker import SchemaChecker

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


async def fault_of(
    schema: dict[str, Any] | bool,
    outputs: list[Completion],
    checker: SchemaChecker,
    *,
    namespace: str,
) -> str | None:
    """Return why answers do not fit a schema, or None when all of them do.

    Args:
        schema: As `schema_of` returned it.
        outputs: The answers. One without text, such as a tool call, is not held to the schema.
        checker: Checks them.
        namespace: Whose they are.

    Raises:
        InvalidRequestError: The schema cannot be checked by, or checking is too costly.
        ServiceError: The check failed for no fault of the schema.
    """
    held = [output for output in outputs if output.text or output.finish_reason != "tool_calls"]
    faults = await checker.faults(schema, [output.text for output in held], namespace=namespace)
    for output, fault in zip(held, faults, strict=True):
        if fault is None:
            continue
        which = f"answer {output.index} " if len(outputs) > 1 else "the answer "
        cut = "; it was cut at its token limit" if output.finish_reason == "length" else ""
        return f"{which}does not fit the schema: {fault}{cut}"
    return None


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
