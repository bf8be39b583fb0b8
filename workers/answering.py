"""From a job's request to its result: prompts through the engine, bodies through the handlers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError

from schema.errors import InvalidRequestError, UnknownModelError
from schema.jobs import (
    Completion,
    JobError,
    JobOptions,
    JobResult,
    JobState,
    OpenAIRequest,
    PromptRequest,
    Provenance,
    Reuse,
    Sampling,
)
from workers import answer_schema
from workers.engine.output import EnhancedRequestOutput
from workers.engine.scope import ReportEntry, RequestScope
from workers.store.records import ClaimedJob, Outcome

if TYPE_CHECKING:
    from workers.engine.llm import EnhancedAsyncLLM
    from workers.engine.protocols import StoredAnswer
    from workers.handler_stream import OnText
    from workers.handlers import HandlerAnswer, OpenAIHandlers
    from workers.schema_checker import SchemaChecker


class TryAgainError(Exception):
    """The attempt failed in a way that may pass by.

    Args:
        error: What is kept with the job.
    """

    def __init__(self, error: JobError) -> None:
        self.error = error
        super().__init__(error.message)


class Answerer:
    """Answers claimed jobs.

    Args:
        llm: The engine.
        handlers: vLLM's OpenAI handlers over it.
        checker: Holds answers to the schemas of their requests.
        model: Name the model is served under.
        others: Further names of it, and those of LoRA modules that are served with it.
    """

    def __init__(
        self,
        llm: EnhancedAsyncLLM,
        handlers: OpenAIHandlers,
        *,
        checker: SchemaChecker,
        model: str,
        others: Collection[str] = (),
    ) -> None:
        self._llm = llm
        self._handlers = handlers
        self._checker = checker
        self._model = model
        self._others = frozenset(others)

    async def answer(
        self,
        job: ClaimedJob,
        *,
        on_text: OnText | None = None,
        trace_headers: dict[str, str] | None = None,
    ) -> Outcome:
        """Answer one job, or say why it cannot be answered.

        Args:
            job: Held by this worker.
            on_text: Takes the text while it grows, for a job that asked for it.
            trace_headers: What vLLM's spans belong to.

        Returns:
            The outcome, to be committed: done, or failed by a fault of the request.

        Raises:
            TryAgainError: vLLM failed in a way that may pass by.
            EngineDeadError: The engine is gone.
        """
        try:
            request, options = job.parse_request(), job.parse_options()
            schema = answer_schema.schema_of(request)
            if schema is None:
                return await self._answer(job, request, options, on_text, trace_headers)
            return await self._fitting(job, request, options, schema, on_text, trace_headers)
        except InvalidRequestError as exc:
            return refused(job, exc)
        except (VLLMClientError, ValueError, TypeError) as exc:
            # The request was wrong in a way that only the engine could see.
            field, value = getattr(exc, "parameter", None), getattr(exc, "value", None)
            return refused(job, InvalidRequestError(str(exc), field=field, value=value))

    async def _fitting(
        self,
        job: ClaimedJob,
        request: PromptRequest | OpenAIRequest,
        options: JobOptions,
        schema: dict[str, Any] | bool,
        on_text: OnText | None,
        trace_headers: dict[str, str] | None,
    ) -> Outcome:
        """Return an answer that fits the schema; one that does not is kept nowhere."""
        outcome, first = await self._tried(job, request, options, schema, trace_headers)
        if first is not None:
            if not answer_schema.is_repeatable(request) and options.reuse is not Reuse.ALWAYS:
                # Its seed is ours alone: a sampled request stays one that is never stored.
                options = options.model_copy(update={"reuse": Reuse.OFF})
            again = answer_schema.second_try(request)
            outcome, second = await self._tried(job, again, options, schema, trace_headers)
            if second is not None:
                error = JobError(type="AnswerSchemaError", message=second, status_code=422)
                return failed(job, error)
            outcome.result.metadata["schema_retry"] = first
            # It answers another request than the one that was made.
            outcome = replace(outcome, fingerprint=None)
        if on_text is not None:
            # Only now: a first try that did not fit must not be read by anybody.
            for answer in outcome.result.outputs:
                await on_text(answer.index, 0, answer.text)
        return outcome

    async def _tried(
        self,
        job: ClaimedJob,
        request: PromptRequest | OpenAIRequest,
        options: JobOptions,
        schema: dict[str, Any] | bool,
        trace_headers: dict[str, str] | None,
    ) -> tuple[Outcome, str | None]:
        """Return an answer and why it does not fit; unless it is known to fit, it is forgotten."""
        verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        outcome, fits = None, False
        try:
            outcome = await self._answer(job, request, options, None, trace_headers, verdict)
            fault = await self._misfit(outcome, schema)
            fits = fault is None
        finally:
            verdict.set_result(fits)
            if not fits and outcome is not None and outcome.answer_id is not None:
                self._llm.forget(namespace=job.namespace, answer_ids=frozenset({outcome.answer_id}))
        return outcome, fault

    async def _misfit(self, outcome: Outcome, schema: dict[str, Any] | bool) -> str | None:
        if outcome.result.status is not JobState.DONE:
            return None
        return await answer_schema.fault_of(
            schema, outcome.result.outputs, self._checker, namespace=outcome.result.namespace
        )

    async def _answer(
        self,
        job: ClaimedJob,
        request: PromptRequest | OpenAIRequest,
        options: JobOptions,
        on_text: OnText | None,
        trace_headers: dict[str, str] | None,
        verdict: asyncio.Future[bool] | None = None,
    ) -> Outcome:
        scope = _scope_of(job, request, options, trace_headers, verdict)
        with scope.active():
            if isinstance(request, PromptRequest):
                return await self._prompt(job, request, scope, on_text)
            return await self._body(job, request, scope, on_text)

    async def _prompt(
        self, job: ClaimedJob, request: PromptRequest, scope: RequestScope, on_text: OnText | None
    ) -> Outcome:
        params = sampling_params(request.sampling, streams=on_text is not None)
        final: EnhancedRequestOutput | None = None
        said: dict[int, list[str]] = {}
        length: dict[int, int] = {}
        generated = 0
        adapted: dict[str, Any] = {}
        if job.model in self._others:
            adapted["lora_request"] = self._handlers.adapter(job.model)
        async for output in self._llm.generate(request.prompt, params, str(job.id), **adapted):
            final = output
            generated += sum(len(piece.token_ids) for piece in output.outputs)
            if on_text is not None:
                for piece in output.outputs:
                    if piece.text:
                        await on_text(piece.index, length.get(piece.index, 0), piece.text)
                    said.setdefault(piece.index, []).append(piece.text)
                    length[piece.index] = length.get(piece.index, 0) + len(piece.text)
        if final is None:
            msg = "the engine ended without an answer"
            raise TryAgainError(JobError(type="EngineFailedError", message=msg))
        entry = scope.report.entries[0]
        outputs = _completions(entry, final, said)
        return _outcome(
            job,
            entry,
            text=outputs[0].text if outputs else "",
            outputs=outputs,
            tokens=(len(final.prompt_token_ids or ()), generated),
        )

    async def _body(
        self, job: ClaimedJob, request: OpenAIRequest, scope: RequestScope, on_text: OnText | None
    ) -> Outcome:
        body = {**request.body}
        named = body.get("model")
        served = job.model if job.model in self._others else self._model
        if named not in (None, "", served):
            msg = f"the job is for {served}; leave model out of the body, or name that"
            raise UnknownModelError(msg, field="model", value=named)
        body["model"] = served
        # The job's id lets a person find the request in vLLM's own log.
        body.setdefault("request_id", str(job.id))
        answer = await self._handlers.answer(request.url, body, on_text=on_text)
        if not answer.ok:
            if answer.status_code >= 500 and self._llm.errored:
                raise EngineDeadError  # a stream tells of it as of any other error
            return _handler_error(job, answer)
        entry = scope.report.entries[0] if scope.report.entries else None
        outputs = _choices(answer.body)
        return _outcome(
            job,
            entry,
            text=outputs[0].text if outputs else None,
            outputs=outputs,
            body=answer.body,
            alone=len(scope.report.entries) == 1,
        )


def sampling_params(sampling: Sampling, *, streams: bool = False) -> SamplingParams:
    """Return vLLM's parameters for ours.

    Args:
        sampling: Checked as far as that goes without the model.
        streams: Whether deltas are wanted; else only the final output.

    Raises:
        ValueError: vLLM refuses them.
    """
    fields = sampling.model_dump(exclude_none=True)
    if constraint := fields.pop("structured_outputs", None):
        fields["structured_outputs"] = StructuredOutputsParams(**constraint)
    kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**fields, output_kind=kind)


def refused(job: ClaimedJob, error: InvalidRequestError) -> Outcome:
    """Return the outcome of a job whose request cannot be answered.

    Args:
        job: Held by this worker.
        error: What was wrong with it.
    """
    return failed(
        job,
        JobError(
            type=type(error).__name__,
            message=str(error),
            field=error.field,
            value=error.value,
            # As vLLM's server answers for a model that it does not have.
            status_code=404 if isinstance(error, UnknownModelError) else 400,
        ),
    )


def failed(job: ClaimedJob, error: JobError, *, status: JobState = JobState.FAILED) -> Outcome:
    """Return the outcome of a job that ends without an answer.

    Args:
        job: Held by this worker.
        error: Why.
        status: Its last state.
    """
    result = JobResult(
        job_id=job.id,
        namespace=job.namespace,
        status=status,
        token=job.token,
        custom_id=job.custom_id,
        batch_id=job.batch_id,
        error=error,
        finished_at=datetime.now(UTC),
    )
    return Outcome(job_id=job.id, token=job.token, result=result)


def _handler_error(job: ClaimedJob, answer: HandlerAnswer) -> Outcome:
    said = answer.body.get("error")
    details = said if isinstance(said, dict) else {}
    error = JobError(
        type=str(details.get("type") or "BadRequestError"),
        message=str(details.get("message") or answer.body),
        field=details.get("param"),
        status_code=answer.status_code,
        retryable=answer.status_code >= 500,
        body=answer.body,
    )
    if error.retryable:
        raise TryAgainError(error)
    return failed(job, error)


def _outcome(
    job: ClaimedJob,
    entry: ReportEntry | None,
    *,
    text: str | None,
    outputs: list[Completion],
    body: dict[str, Any] | None = None,
    tokens: tuple[int, int] = (0, 0),
    alone: bool = True,
) -> Outcome:
    answer = entry.answer if entry is not None else None
    metadata = {**(entry.metadata if entry is not None else {}), **_cost(answer, body, tokens)}
    provenance = metadata.get("provenance")
    # An answer that was given by meaning has the fingerprint of another request.
    repeatable = alone and provenance != Provenance.SEMANTIC
    source = metadata.get("source_answer_id") or metadata.get("answer_id")
    return Outcome(
        job_id=job.id,
        token=job.token,
        result=JobResult(
            job_id=job.id,
            namespace=job.namespace,
            status=JobState.DONE,
            token=job.token,
            custom_id=job.custom_id,
            batch_id=job.batch_id,
            text=text,
            outputs=outputs,
            body=body,
            metadata=metadata,
            finished_at=datetime.now(UTC),
        ),
        answer=answer if entry is not None and not entry.stored else None,
        provenance=Provenance(provenance) if provenance else None,
        answer_id=UUID(source) if source else None,
        fingerprint=answer.fingerprint if answer is not None and repeatable else None,
    )


def _cost(
    answer: StoredAnswer | None, body: dict[str, Any] | None, tokens: tuple[int, int]
) -> dict[str, Any]:
    """Return the tokens of an answer, and the seconds that generating it took, now or once."""
    if (usage := (body or {}).get("usage")) is not None:
        tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    elif answer is not None:
        tokens = answer.prompt_tokens, answer.completion_tokens
    seconds = {} if answer is None else {"engine_s": round(answer.engine_s, 6)}
    return {"tokens": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}, **seconds}


def _completions(
    entry: ReportEntry, final: EnhancedRequestOutput, said: dict[int, list[str]]
) -> list[Completion]:
    """Return the answers of a prompt job, whole also when they came in pieces."""
    if entry.answer is not None:
        return [
            Completion(
                index=stored.index,
                text=stored.text,
                token_ids=list(stored.token_ids),
                finish_reason=stored.finish_reason,
                stop_reason=stored.stop_reason,
                cumulative_logprob=stored.cumulative_logprob,
                logprobs=_logprobs(stored.logprobs),
            )
            for stored in entry.answer.completions
        ]
    return [
        Completion(
            index=piece.index,
            text="".join(said[piece.index]) if piece.index in said else piece.text,
            token_ids=[] if said else list(piece.token_ids),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            cumulative_logprob=piece.cumulative_logprob,
        )
        for piece in final.outputs
    ]


def _logprobs(packed: Any) -> list[dict[str, Any]] | None:
    if packed is None:
        return None
    return [
        {
            "candidates": [
                {"token_id": token, "logprob": logprob, "rank": rank, "token": decoded}
                for token, logprob, rank, decoded in position or ()
            ]
        }
        for position in packed
    ]


def _choices(body: dict[str, Any]) -> list[Completion]:
    """Return the answers inside an OpenAI response; none for embeddings and scores."""
    choices = body.get("choices")
    return [
        Completion(
            index=choice.get("index", 0),
            text=(choice.get("message") or {}).get("content") or choice.get("text") or "",
            finish_reason=choice.get("finish_reason"),
            stop_reason=choice.get("stop_reason"),
        )
        for choice in (choices if isinstance(choices, list) else [])
    ]


def _scope_of(
    job: ClaimedJob,
    request: PromptRequest | OpenAIRequest,
    options: JobOptions,
    trace_headers: dict[str, str] | None = None,
    verdict: asyncio.Future[bool] | None = None,
) -> RequestScope:
    text, context = (None, b"") if isinstance(request, PromptRequest) else _compared(request)
    return RequestScope(
        namespace=job.namespace,
        reuse=options.reuse,
        text=text,
        context=context,
        threshold=options.threshold,
        ttl_s=options.ttl_s,
        sliding_ttl=options.sliding_ttl,
        shadow=options.shadow,
        verify=options.verify,
        tags=tuple(options.tags),
        job_id=job.id,
        analyse_answer=options.analyse_answer,
        trace_headers=trace_headers,
        deferred=True,
        verdict=verdict,
    )


def _compared(request: OpenAIRequest) -> tuple[str | None, bytes]:
    """Return the text of a body that neighbours are compared by, and a digest of all the rest.

    For a chat that is the last user turn: the turns before, the system prompt and the tools must be
    equal for an answer to be reused by meaning.
    """
    body = {name: value for name, value in request.body.items() if name not in _NOT_ASKED}
    messages = body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1]
        text = last.get("content")
        if last.get("role") == "user" and isinstance(text, str):
            body["messages"] = [*messages[:-1], {**last, "content": ""}]
            return text, _digest(request.url, body)
    for name in ("prompt", "input"):
        if isinstance(text := body.get(name), str):
            return text, _digest(request.url, {**body, name: ""})
    return None, _digest(request.url, body)


#: Fields of a body that say who asks or how the answer is carried, never what is asked.
_NOT_ASKED = frozenset({"model", "user", "request_id", "metadata", "stream", "stream_options"})


def _digest(url: str, body: dict[str, Any]) -> bytes:
    text = orjson.dumps([url, body], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).digest()
