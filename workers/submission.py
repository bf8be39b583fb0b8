"""From what a caller says to a `JobSpec`: every wrong value is refused here, before any queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypedDict
from uuid import UUID

import orjson
from pydantic import ValidationError

from schema.errors import InvalidRequestError, shown
from schema.jobs import JobOptions, JobSpec, OpenAIRequest, PromptRequest, Reuse, Sampling, Verify
from schema.names import DEFAULT_NAMESPACE, job_id_for
from schema.refusal import did_you_mean, refusal, refuse_non_finite

if TYPE_CHECKING:
    from collections.abc import Iterable

CHAT_URL = "/v1/chat/completions"


class SubmitOptions(TypedDict, total=False):
    """What may be said of a job beside its prompt. Every one may be left out."""

    messages: Sequence[Mapping[str, Any]]
    """Chat turns, instead of a prompt; `sampling` applies to them too."""
    body: Mapping[str, Any]
    """Body of an OpenAI endpoint, instead of a prompt; it says its own sampling."""
    url: str
    """The endpoint of `body`; chat completions unless told."""
    sampling: Mapping[str, Any]
    """vLLM's sampling parameters by name; see `schema.jobs.Sampling`."""
    namespace: str
    """Tenant; the settings' own unless told."""
    model: str
    """Served name of the model; the deployment's default unless told."""
    channel: str
    """Result channel."""
    priority: int
    """0 is served first, 9 last."""
    idempotency_key: str
    """Submissions under one key are one job, however often they come."""
    reuse: Reuse | str
    """Which stored answers will do: off, exact, always or semantic."""
    threshold: float
    """Cosine similarity from which a neighbour's answer may be served."""
    ttl_s: float
    """Seconds that the stored answer stays reusable."""
    sliding_ttl: bool
    """Whether each use of the stored answer starts its time anew."""
    shadow: bool
    """Decide on reuse by meaning and record it, but generate the answer all the same."""
    verify: Verify | str
    """Who has the last word on a neighbour's answer: guard, or engine as well."""
    tags: Sequence[str]
    """Labels of the stored answer, to invalidate it by."""
    stream: bool
    """Publish deltas while the answer grows."""
    analyse_answer: bool
    """Run the enrichers on the answer too."""
    max_attempts: int
    """Times the job is tried."""
    deadline: datetime
    """Not run after this moment; with a time zone."""
    batch_id: UUID
    """The batch it belongs to."""
    custom_id: str
    """Its name in the batch."""
    row: int
    """Its place in the batch."""
    id: UUID
    """Its id, when the caller keeps account of ids."""


_REQUEST_FIELDS = frozenset({"messages", "body", "url", "sampling"})
_JOB_FIELDS = frozenset(JobSpec.model_fields) - {"request", "options"}
_OPTION_FIELDS = frozenset(JobOptions.model_fields)
_CHOICES: dict[str, type[StrEnum]] = {"reuse": Reuse, "verify": Verify}
_KNOWN = _REQUEST_FIELDS | _JOB_FIELDS | _OPTION_FIELDS


@dataclass(frozen=True, kw_only=True)
class SubmitDefaults:
    """What the settings say of every job."""

    namespace: str = DEFAULT_NAMESPACE
    max_prompt_bytes: int = 1_000_000  # of UTF-8; a body counts as its JSON


def build_spec(
    prompt: object, options: Mapping[str, Any], defaults: SubmitDefaults = SubmitDefaults()
) -> JobSpec:
    """Return the job that a caller asked for.

    Args:
        prompt: Text as the model shall see it; None when `messages` or `body` is given.
        options: As `SubmitOptions`. None means not given.
        defaults: From the settings.

    Returns:
        A valid job.

    Raises:
        InvalidRequestError: A field is unknown or holds a value that cannot be accepted; the error
            names both.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - _KNOWN):
        hint = did_you_mean(unknown[0], sorted(_KNOWN | {"prompt"}))
        msg = f"is not a known field{hint}"
        raise InvalidRequestError(msg, field=unknown[0], value=given[unknown[0]])
    job = {name: given[name] for name in given.keys() & _JOB_FIELDS}
    job.setdefault("namespace", defaults.namespace)
    treatment = {name: _plain(given[name]) for name in given.keys() & _OPTION_FIELDS}
    for name, kind in _CHOICES.items():
        if name in treatment:
            treatment[name] = _choice(kind, name, treatment[name])
    try:
        job["request"] = _request(prompt, given, defaults.max_prompt_bytes)
        if treatment:
            job["options"] = JobOptions.model_validate(treatment, strict=True)
        spec = JobSpec.model_validate(job, strict=True)
    except ValidationError as exc:
        raise refusal(exc) from None
    except RecursionError:
        msg = "is nested too deeply"
        raise InvalidRequestError(msg, field="body") from None
    return keyed(spec) if "id" not in job else spec


def keyed(spec: JobSpec) -> JobSpec:
    """Return the job under the id that its idempotency key decides, if it has a key.

    Args:
        spec: Any job.
    """
    if spec.idempotency_key is None:
        return spec
    job_id = job_id_for(spec.namespace, spec.idempotency_key)
    return spec if spec.id == job_id else spec.model_copy(update={"id": job_id})


def _request(
    prompt: object, given: Mapping[str, Any], max_bytes: int
) -> PromptRequest | OpenAIRequest:
    sources = [name for name in ("messages", "body") if name in given]
    if prompt is not None:
        sources.insert(0, "prompt")
    if len(sources) != 1:
        what = " and ".join(sources) if sources else "none of them"
        msg = f"give exactly one of prompt, messages and body; {what} was given"
        raise InvalidRequestError(msg, field=sources[-1] if sources else "prompt")
    if "url" in given and "body" not in given:
        msg = "belongs to a body; leave it out"
        raise InvalidRequestError(msg, field="url", value=given["url"])
    if sources == ["prompt"]:
        _check_size(prompt, max_bytes)
        sampling = _sampling(given.get("sampling"))
        return PromptRequest.model_validate({"prompt": prompt, "sampling": sampling}, strict=True)
    if sources == ["messages"]:
        body = chat_body(given["messages"], _sampling(given.get("sampling")))
        return _openai(CHAT_URL, body, max_bytes, "messages")
    if "sampling" in given:
        msg = "belongs to a prompt or to messages; a body says its own"
        raise InvalidRequestError(msg, field="sampling")
    return _openai(given.get("url", CHAT_URL), _plain(given["body"]), max_bytes, "body")


def chat_body(messages: object, sampling: Sampling) -> dict[str, Any]:
    """Return the body of a chat request that is sampled as a prompt would be.

    Args:
        messages: Chat turns.
        sampling: What was asked for; vLLM's chat requests know all of it by the same names, log
            probabilities excepted.

    Raises:
        InvalidRequestError: The turns are not a list of objects with a role.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        msg = f"must be a list of at least one turn, not {shown(messages)}"
        raise InvalidRequestError(msg, field="messages", value=messages)
    turns = []
    for at, turn in enumerate(messages):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            msg = f"must be an object with a role, not {shown(turn)}"
            raise InvalidRequestError(msg, field=f"messages[{at}]", value=turn)
        turns.append(_plain(turn))
    # What was not asked for is left to vLLM, but for what differs between chat and prompts.
    asked = sampling.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    asked = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, **asked}
    if (count := asked.pop("logprobs", None)) is not None:
        asked |= {"logprobs": True, "top_logprobs": count}
    return {"messages": turns, **asked}


def _sampling(value: object) -> Sampling:
    if value is None:
        return Sampling()
    if isinstance(value, Sampling):
        return value
    if not isinstance(value, Mapping):
        msg = f"must be an object of vLLM's sampling parameters, not {shown(value)}"
        raise InvalidRequestError(msg, field="sampling", value=value)
    refuse_non_finite(value := _plain(value), "sampling")
    try:
        # As JSON, in which the keys of logit_bias are text.
        text = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
        return Sampling.model_validate_json(text, strict=True)
    except ValidationError as exc:
        inner = refusal(exc)
        field = "sampling" if inner.field == "job" else f"sampling.{inner.field}"
        message = str(inner).removeprefix(f"{inner.field}: ")
        if "is not a known field" in message and inner.field:
            message = f"is not a known field{did_you_mean(inner.field, Sampling.model_fields)}"
        raise InvalidRequestError(message, field=field, value=exc.errors()[0]["input"]) from None
    except (orjson.JSONEncodeError, RecursionError) as exc:
        msg = f"is not JSON that can be stored ({exc})"
        raise InvalidRequestError(msg, field="sampling") from None


def _openai(url: object, body: object, max_bytes: int, field: str) -> OpenAIRequest:
    if not isinstance(body, dict):
        msg = f"must be an object, not {shown(body)}"
        raise InvalidRequestError(msg, field=field, value=body)
    if not isinstance(url, str):
        msg = f"must be the path of an endpoint, not {shown(url)}"
        raise InvalidRequestError(msg, field="url", value=url)
    refuse_non_finite(body, "body")
    request = OpenAIRequest.model_validate({"url": url, "body": body}, strict=True)
    _check_size(request.body, max_bytes, field)
    return request


def _check_size(value: object, max_bytes: int, field: str = "prompt") -> None:
    if isinstance(value, str):
        # Four bytes are the most that a character takes: most prompts need no encoding to tell.
        size = len(value)
        if max_bytes // 4 < size <= max_bytes:
            size = len(value.encode(errors="replace"))
    elif isinstance(value, dict):
        try:
            size = len(orjson.dumps(value, default=str))
        except (orjson.JSONEncodeError, RecursionError) as exc:
            # Half a surrogate pair, an integer above 64 bits, a key that is no text.
            msg = f"is not JSON that can be stored ({exc})"
            raise InvalidRequestError(msg, field=field) from None
    else:
        return
    if size > max_bytes:
        msg = (
            f"is {size:,} bytes long; at most {max_bytes:,} are accepted "
            "(PROMPTMILL_MAX_PROMPT_BYTES)"
        )
        raise InvalidRequestError(msg, field=field, value=value if field == "prompt" else None)


def _choice(kind: type[StrEnum], field: str, value: object) -> StrEnum:
    try:
        return kind(value)  # type: ignore[arg-type]  # anything may come here
    except ValueError:
        known = [one.value for one in kind]
        hint = did_you_mean(str(value), known)
        msg = f"must be one of {', '.join(known)}, not {shown(value)}{hint}"
        raise InvalidRequestError(msg, field=field, value=value) from None


def _plain(value: Any) -> Any:
    """Return tuples as lists and mappings as dicts, one level deep and below, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def as_options(request: object) -> tuple[object, dict[str, Any]]:
    """Split one item of a bulk submission into its prompt and its options.

    Args:
        request: A prompt, or a mapping with the key ``prompt`` or with `SubmitOptions`.

    Raises:
        InvalidRequestError: It is neither.
    """
    if isinstance(request, str):
        return request, {}
    if isinstance(request, Mapping):
        options = dict(request)
        return options.pop("prompt", None), options
    msg = f"must be a prompt, a mapping of options or a JobSpec, not {shown(request)}"
    raise InvalidRequestError(msg, field="requests", value=request)


def build_specs(
    requests: Iterable[object], common: Mapping[str, Any], defaults: SubmitDefaults
) -> Iterable[JobSpec]:
    """Yield the jobs of a bulk submission, each as `build_spec` makes it.

    Args:
        requests: Prompts, mappings of options, or `JobSpec` values, which are taken as they are.
        common: Options for those that do not say otherwise.
        defaults: From the settings.

    Raises:
        InvalidRequestError: One cannot be accepted; the field begins with its place.
    """
    for at, request in enumerate(requests):
        if isinstance(request, JobSpec):
            yield keyed(request)
            continue
        try:
            prompt, options = as_options(request)
            yield build_spec(prompt, {**common, **options}, defaults)
        except InvalidRequestError as exc:
            message = str(exc).removeprefix(f"{exc.field}: ")
            raise InvalidRequestError(message, field=f"requests[{at}].{exc.field}") from None
