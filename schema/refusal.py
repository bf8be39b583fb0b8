"""Turns pydantic's validation errors into ours: the field, the value, and what would be right."""

from __future__ import annotations

import difflib
import math
import re
from typing import TYPE_CHECKING, Any

from schema.errors import InvalidRequestError, shown
from schema.jobs import JobOptions, JobSpec, OpenAIRequest, PromptRequest, Sampling

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ValidationError

_FIELDS: dict[str, Iterable[str]] = {
    "sampling": Sampling.model_fields,
    "options": JobOptions.model_fields,
    "request": [*PromptRequest.model_fields, *OpenAIRequest.model_fields],
    "": JobSpec.model_fields,
}
_OPENING = re.compile(r"^(Input|String|List|Dictionary|UUID|Datetime) should ")
# These say of themselves which value was wrong, or there is none to show.
_NO_VALUE = frozenset({"value_error", "missing", "extra_forbidden", "union_tag_invalid"})


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name closest to `name`, or an empty string.

    Args:
        name: What was given.
        known: What would be right.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def refusal(error: ValidationError) -> InvalidRequestError:
    """Return our error for the first fault that pydantic found.

    Args:
        error: From validating a `JobSpec` or a part of one.

    Returns:
        An error whose field is the dotted path that a caller would write, such as
        ``sampling.temperature``.
    """
    fault: Any = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"] if part != "[key]"]
    # The tag of the union stands in pydantic's path and in no caller's: request.prompt.sampling.
    if len(path) > 1 and path[0] == "request" and path[1] in ("prompt", "openai"):
        path = path[2:] or ["request"]
    kind, value = fault["type"], fault["input"]
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        section = path[-2] if len(path) > 1 else ""
        message = f"is not a known field{did_you_mean(path[-1], _FIELDS.get(section, ()))}"
    elif kind == "missing":
        message, value = "is required", None
    elif kind == "union_tag_invalid":
        message, value = "has a kind that is neither 'prompt' nor 'openai'", value.get("kind")
    else:
        message = _OPENING.sub("must ", message)
    if kind not in _NO_VALUE:
        message = f"{message}, not {shown(value)}"
    return InvalidRequestError(message, field=".".join(path) or "job", value=value)


def refuse_non_finite(value: object, at: str) -> None:
    """Refuse NaN and the infinities, which no JSON and no Postgres column of ours can hold.

    Args:
        value: Parsed JSON.
        at: Dotted path of `value`, for the message.

    Raises:
        InvalidRequestError: One is somewhere inside; the field is its path.
    """
    if isinstance(value, float) and not math.isfinite(value):
        msg = f"must be a finite number, not {value}"
        raise InvalidRequestError(msg, field=at, value=value)
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_non_finite(item, f"{at}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            refuse_non_finite(item, f"{at}[{index}]")
