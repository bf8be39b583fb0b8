"""What a job is: the request, its options, its states and its result.

These models are the wire format too: ``model_dump(mode="json")`` of a `JobSpec` is what a producer
in any language sends, and of a `JobResult` what a result channel carries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from schema.names import (
    DEFAULT_CHANNEL,
    DEFAULT_NAMESPACE,
    DEFAULT_PRIORITY,
    NAME_PATTERN,
    new_job_id,
)

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class JobState(StrEnum):
    """Where a job stands. The last four are terminal."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether no further change of state can follow."""
        return self not in {JobState.QUEUED, JobState.RUNNING}


class Reuse(StrEnum):
    """Which stored answers a job may be given, and whether its own may be stored."""

    OFF = "off"
    """Neither read nor stored."""
    EXACT = "exact"
    """The same request, greedy or seeded: the default."""
    ALWAYS = "always"
    """The same request, sampled ones included."""
    SEMANTIC = "semantic"
    """As exact, and also a stored answer to a guarded neighbour of the prompt."""


class Verify(StrEnum):
    """Who has the last word before a neighbour's answer is given."""

    GUARD = "guard"
    """The guard's rules: the default."""
    ENGINE = "engine"
    """The guard, and then the served model, asked in one token whether both are the same."""


class Provenance(StrEnum):
    """How an answer came about."""

    GENERATED = "generated"
    EXACT = "exact"
    SEMANTIC = "semantic"
    COALESCED = "coalesced"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


def check_text(text: str) -> str:
    """Refuse text that no database or tokenizer can hold.

    Args:
        text: Any string.

    Returns:
        The same string.

    Raises:
        ValueError: It holds a NUL character or half of a surrogate pair (invalid UTF-8).
    """
    if (at := text.find("\x00")) >= 0:
        msg = f"holds a NUL character at position {at}; remove it"
        raise ValueError(msg)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        msg = f"is not valid UTF-8 (lone surrogate at position {exc.start}); encode it anew"
        raise ValueError(msg) from None
    return text


def check_texts(value: JsonValue, at: str = "") -> None:
    """Apply `check_text` to every string and key inside a JSON value.

    Args:
        value: Parsed JSON.
        at: Dotted path of `value`, for the message.

    Raises:
        ValueError: As `check_text`, with the path of the string.
    """
    if isinstance(value, str):
        try:
            check_text(value)
        except ValueError as exc:
            msg = f"{at or 'text'} {exc}"
            raise ValueError(msg) from None
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_texts(item, f"{at}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_texts(key, at)
            check_texts(item, f"{at}.{key}" if at else key)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Sampling(_Frozen):
    """vLLM's sampling parameters, as far as JSON can carry them; the names are vLLM's own.

    What is not given is left to vLLM's default, `max_tokens` excepted: vLLM's 16 would cut nearly
    every answer.
    """

    n: int = Field(1, ge=1, le=128, description="answers to one prompt")
    temperature: float = Field(0.0, ge=0, le=10, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=10_000_000, description="0 and -1 keep all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    max_tokens: int = Field(256, ge=1, le=10_000_000, description="tokens an answer may have")
    min_tokens: int = Field(0, ge=0, le=10_000_000)
    stop: list[str] = Field(default_factory=list, max_length=64)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=1024)
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=-1, le=1000)
    prompt_logprobs: int | None = Field(None, ge=-1, le=1000)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = Field(None, max_length=1024)
    structured_outputs: dict[str, JsonValue] | None = Field(
        None, description="one of vLLM's constraints: json, regex, choice, grammar, json_object"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("stop", "bad_words")
    @classmethod
    def _no_empty_strings(cls, value: list[str] | None) -> list[str] | None:
        for text in value or ():
            if not text:
                msg = "an empty string stops nothing; leave it out"
                raise ValueError(msg)
            check_text(text)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Sampling:
        if self.min_tokens > self.max_tokens:
            msg = f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})"
            raise ValueError(msg)
        if self.n > 1 and self.temperature == 0:
            msg = f"n={self.n} needs a temperature above 0: greedy answers would all be the same"
            raise ValueError(msg)
        check_texts(self.structured_outputs, "structured_outputs")
        return self


_DEFAULT_SAMPLING = Sampling()


class PromptRequest(_Frozen):
    """A raw prompt with sampling parameters, as in vLLM's ``generate``."""

    kind: Literal["prompt"] = "prompt"
    prompt: str = Field(description="text as the model shall see it, without a chat template")
    # Shared: pydantic would copy a plain default for every request.
    sampling: Sampling = Field(default_factory=lambda: _DEFAULT_SAMPLING)

    @field_validator("prompt")
    @classmethod
    def _prompt_is_text(cls, value: str) -> str:
        if not value.strip():
            msg = "is empty; give at least one visible character"
            raise ValueError(msg)
        return check_text(value)


#: OpenAI endpoints that vLLM's handlers serve (which of them work depends on the model).
OPENAI_URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/score",
    "/score",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
)


class OpenAIRequest(_Frozen):
    """The body of an OpenAI endpoint, answered by vLLM's own handler for it."""

    kind: Literal["openai"] = "openai"
    url: str = Field("/v1/chat/completions", description="path of the endpoint")
    body: dict[str, JsonValue]

    @field_validator("url")
    @classmethod
    def _url_is_known(cls, value: str) -> str:
        if value not in OPENAI_URLS:
            msg = f"is not an endpoint of ours; use one of {', '.join(OPENAI_URLS)}"
            raise ValueError(msg)
        return value

    @field_validator("body")
    @classmethod
    def _body_is_storable(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if value.get("stream"):
            msg = "stream must be false; ask for deltas with the job's own option stream"
            raise ValueError(msg)
        check_texts(value)
        return value


class JobOptions(_Frozen):
    """How a job is to be treated; nothing here changes what the model is asked."""

    reuse: Reuse | None = Field(
        None, description="None: as the worker is configured for the namespace, else exact"
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="cosine similarity from which a neighbour may be served"
    )
    ttl_s: float | None = Field(
        None, gt=0, le=10 * 366 * 86400, description="seconds the stored answer stays reusable"
    )
    sliding_ttl: bool | None = Field(
        None, description="a hit starts the stored answer's time anew; None is as configured"
    )
    shadow: bool | None = Field(
        None, description="decide on reuse and record it, but generate; None is as configured"
    )
    verify: Verify | None = Field(
        None, description="who has the last word on a neighbour; None is as configured"
    )
    tags: list[Name] = Field(default_factory=list, max_length=32)
    stream: bool = Field(False, description="publish deltas while the answer grows")
    analyse_answer: bool = Field(False, description="run the enrichers on the answer too")
    max_attempts: int | None = Field(None, ge=1, le=100)


_DEFAULT_OPTIONS = JobOptions()


class JobSpec(_Frozen):
    """One job as a producer states it."""

    id: UUID = Field(default_factory=new_job_id)
    namespace: Name = DEFAULT_NAMESPACE
    model: Name | None = Field(None, description="served model; None is the deployment's default")
    channel: Name = DEFAULT_CHANNEL
    priority: int = Field(DEFAULT_PRIORITY, ge=0, le=9, description="0 is served first")
    request: Annotated[PromptRequest | OpenAIRequest, Field(discriminator="kind")]
    options: JobOptions = Field(default_factory=lambda: _DEFAULT_OPTIONS)
    idempotency_key: str | None = Field(None, min_length=1, max_length=512)
    deadline: datetime | None = Field(None, description="not run after this moment (with a zone)")
    batch_id: UUID | None = None
    custom_id: str | None = Field(None, max_length=512, description="the row's name in its batch")
    row: int | None = Field(None, ge=0, description="the row's place in its batch file")

    @field_validator("deadline")
    @classmethod
    def _deadline_has_a_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            msg = "has no time zone; give one, such as 2030-01-01T00:00:00+00:00"
            raise ValueError(msg)
        return value

    @field_validator("idempotency_key", "custom_id")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        return value if value is None else check_text(value)


class JobError(_Frozen):
    """Why a job has no answer."""

    type: str = Field(description="class of the error, such as InvalidRequestError")
    message: str
    field: str | None = None
    value: str | None = Field(None, description="the offending value, shortened")
    status_code: int | None = Field(None, description="HTTP status that vLLM's handler gave")
    retryable: bool = False
    body: dict[str, Any] | None = Field(None, description="error body of vLLM's handler")


class Completion(_Frozen):
    """One of the `n` answers to a prompt."""

    index: int = 0
    text: str
    token_ids: list[int] = Field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[str, Any]] | None = None


class JobResult(_Frozen):
    """The one outcome of a job, as stored and as delivered."""

    job_id: UUID
    namespace: str
    status: JobState
    token: int = Field(description="fencing token of the run that made it")
    custom_id: str | None = None
    batch_id: UUID | None = None
    text: str | None = Field(None, description="text of the first answer")
    outputs: list[Completion] = Field(default_factory=list)
    body: dict[str, Any] | None = Field(None, description="response body of an OpenAI endpoint")
    metadata: dict[str, Any] = Field(default_factory=dict)
    error: JobError | None = None
    finished_at: datetime | None = None

    @cached_property
    def json_text(self) -> str:
        """The result as JSON: written once, for it is both stored and delivered."""
        try:
            return self.model_dump_json()
        except ValueError:  # half a surrogate pair, which JSON can hold as an escape only
            return json.dumps(self.model_dump(mode="json"))

    @staticmethod
    def written(json_text: str, **fields: Any) -> JobResult:
        """Return a result of which the JSON is at hand.

        Args:
            json_text: The whole result.
            fields: Those that the services look at; not checked.
        """
        result = JobResult.model_construct(**fields)
        result.__dict__["json_text"] = json_text
        return result

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, as pydantic's; it writes JSON of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("json_text", None)
        return copied


class JobStatus(_Frozen):
    """Where a job stands, without its answer."""

    job_id: UUID
    namespace: str
    state: JobState
    model: str
    priority: int
    attempts: int
    crashes: int
    token: int
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    published_at: datetime | None = None
    provenance: Provenance | None = None
    batch_id: UUID | None = None
    custom_id: str | None = None
    error: JobError | None = None
