"""From a transcript to a stored answer, and from a stored answer back to a transcript."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.outputs import CompletionOutput, PoolingOutput, PoolingRequestOutput, RequestOutput

from workers.engine.flight import Stream
from workers.engine.protocols import StoredAnswer, StoredCompletion
from workers.engine.transcript import Transcript

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

#: What vLLM's outputs say that a replay gives again, that is refused by name below, or that tells
#: of the run rather than of the answer.
_KNOWN: dict[type[Any], str] = {
    RequestOutput: """
        request_id prompt prompt_token_ids prompt_logprobs prompt_token_id_logprobs outputs finished
        metrics lora_request encoder_prompt encoder_prompt_token_ids num_cached_tokens
        num_cache_creation_tokens kv_transfer_params ec_transfer_params
    """,
    CompletionOutput: """
        index text token_ids cumulative_logprob logprobs routed_experts finish_reason stop_reason
        lora_request sampling_mask spec_decode_metrics weight_versions
    """,
    PoolingRequestOutput: """
        request_id outputs prompt_token_ids num_cached_tokens finished error
    """,
}
_KNOWN_NAMES = {cls: frozenset(names.split()) for cls, names in _KNOWN.items()}

#: Ends after which an answer is whole and may be given again.
WHOLE = frozenset({"stop", "length"})
#: What vLLM calls the weights that an engine was started with.
_FIRST_WEIGHTS = "default"


class NotStorableError(Exception):
    """The answer cannot be replayed faithfully, for the reason given."""


def _refuse_unknown(output: Any, cls: type[Any]) -> None:
    """Refuse what a newer vLLM says besides: it may belong to the answer, and would be lost."""
    for name, value in vars(output).items():
        empty = value is None or (isinstance(value, (bool, int, float, str, list)) and not value)
        if name not in _KNOWN_NAMES[cls] and not empty:
            msg = f"it carries {name}, which cannot be replayed"
            raise NotStorableError(msg)


def _pack_logprobs(logprobs: Any) -> tuple[Any, ...] | None:
    if logprobs is None:
        return None
    if isinstance(logprobs, FlatLogprobs):
        msg = "flat log probabilities"
        raise NotStorableError(msg)
    return tuple(
        None
        if position is None
        else tuple(
            (int(token), float(item.logprob), item.rank, item.decoded_token)
            for token, item in position.items()
        )
        for position in logprobs
    )


def _unpack_logprobs(packed: Sequence[Any] | None) -> list[Any] | None:
    if packed is None:
        return None
    return [
        None
        if position is None
        else {
            token: Logprob(logprob=logprob, rank=rank, decoded_token=decoded)
            for token, logprob, rank, decoded in position
        }
        for position in packed
    ]


def pack(transcript: Transcript) -> tuple[tuple[StoredCompletion, ...], tuple[Any, ...] | None]:
    """Return the completions and prompt log probabilities of a finished transcript.

    Args:
        transcript: Finished.

    Raises:
        NotStorableError: Replaying it would leave out something that the native output held.
    """
    if not transcript.finished or transcript.head is None:
        msg = "not finished"
        raise NotStorableError(msg)
    head = transcript.head
    _refuse_unknown(head, RequestOutput)
    if head.kv_transfer_params or head.ec_transfer_params:
        msg = "cache transfer between engines"
        raise NotStorableError(msg)
    if transcript.prompt_token_id_logprobs is not None:
        msg = "log probabilities of chosen prompt tokens"
        raise NotStorableError(msg)
    completions = []
    for index, choice in sorted(transcript.choices.items()):
        last = choice.latest
        _refuse_unknown(last, CompletionOutput)
        if last.finish_reason not in WHOLE:
            msg = f"it ended in {last.finish_reason!r}"
            raise NotStorableError(msg)
        if last.routed_experts is not None or choice.sampling_mask is not None:
            msg = "routed experts or sampling masks"
            raise NotStorableError(msg)
        if any(span.version != _FIRST_WEIGHTS for span in last.weight_versions or ()):
            # The engine's identity knows the weights it was started with, and no others.
            msg = "weights that were changed while the engine ran"
            raise NotStorableError(msg)
        completions.append(
            StoredCompletion(
                index=index,
                text="".join(choice.text),
                token_ids=tuple(choice.token_ids),
                finish_reason=last.finish_reason,
                stop_reason=last.stop_reason,
                cumulative_logprob=last.cumulative_logprob,
                logprobs=_pack_logprobs(choice.logprobs),
            )
        )
    return tuple(completions), _pack_logprobs(transcript.prompt_logprobs)


def replay(
    answer: StoredAnswer,
    *,
    prompt: str | None,
    prompt_token_ids: Sequence[int],
    lora_request: LoRARequest | None,
) -> Transcript:
    """Return a finished transcript that reads like the generation that was stored.

    Args:
        answer: Stored earlier.
        prompt: Text of the request that is answered now.
        prompt_token_ids: Its token ids.
        lora_request: Its adapter.
    """
    transcript = Transcript()
    transcript.add(
        RequestOutput(
            request_id="",
            prompt=prompt,
            prompt_token_ids=list(prompt_token_ids),
            prompt_logprobs=_unpack_logprobs(answer.prompt_logprobs),
            outputs=[
                CompletionOutput(
                    index=completion.index,
                    text=completion.text,
                    token_ids=list(completion.token_ids),
                    cumulative_logprob=completion.cumulative_logprob,
                    logprobs=_unpack_logprobs(completion.logprobs),
                    finish_reason=completion.finish_reason,
                    stop_reason=completion.stop_reason,
                    lora_request=lora_request,
                )
                for completion in answer.completions
            ],
            finished=True,
            lora_request=lora_request,
        )
    )
    return transcript


def stream_of(
    answer: StoredAnswer,
    *,
    request_id: str,
    prompt: str | None,
    prompt_token_ids: Sequence[int],
    lora_request: LoRARequest | None,
) -> Stream:
    """Return a finished stream that replays an answer.

    Args:
        answer: Stored earlier.
        request_id: Of the request that is answered now.
        prompt: Its text.
        prompt_token_ids: Its token ids.
        lora_request: Its adapter.
    """
    stream = Stream()
    if answer.kind == "pooling":
        stream.pooled = replay_pooled(
            answer, request_id=request_id, prompt_token_ids=prompt_token_ids
        )
    else:
        stream.transcript = replay(
            answer, prompt=prompt, prompt_token_ids=prompt_token_ids, lora_request=lora_request
        )
    return stream


def with_outputs(answer: StoredAnswer, stream: Stream) -> StoredAnswer:
    """Return an answer with what was generated added.

    Args:
        answer: Without outputs.
        stream: Finished.

    Raises:
        NotStorableError: Replaying it would leave out something that the native output held.
    """
    if stream.pooled is not None:
        pooled, dtype = pack_pooled(stream.pooled)
        return dataclasses.replace(answer, kind="pooling", pooled=pooled, pooled_dtype=dtype)
    completions, prompt_logprobs = pack(stream.transcript)
    return dataclasses.replace(
        answer,
        completions=completions,
        prompt_logprobs=prompt_logprobs,
        completion_tokens=sum(len(completion.token_ids) for completion in completions),
    )


def pack_pooled(output: PoolingRequestOutput) -> tuple[Any, str]:
    """Return a pooling output's data as nested lists, and its dtype's name.

    Args:
        output: Finished.

    Raises:
        NotStorableError: The request failed.
    """
    if output.error is not None or not isinstance(output.outputs, PoolingOutput):
        msg = "the pooling request failed"
        raise NotStorableError(msg)
    _refuse_unknown(output, PoolingRequestOutput)
    data: Any = output.outputs.data
    if not isinstance(data, torch.Tensor):  # of a plug-in of vLLM's own, for one
        msg = f"it computed a {type(data).__name__}, not a tensor"
        raise NotStorableError(msg)
    return data.to(torch.float64).tolist(), str(data.dtype).removeprefix("torch.")


def replay_pooled(
    answer: StoredAnswer, *, request_id: str, prompt_token_ids: Sequence[int]
) -> PoolingRequestOutput:
    """Return a pooling output equal to the stored one.

    Args:
        answer: Of kind ``pooling``.
        request_id: The reader's own.
        prompt_token_ids: Of the request that is answered now.
    """
    dtype = getattr(torch, answer.pooled_dtype or "float32")
    return PoolingRequestOutput(
        request_id=request_id,
        outputs=PoolingOutput(data=torch.tensor(answer.pooled, dtype=dtype)),
        prompt_token_ids=list(prompt_token_ids),
        num_cached_tokens=0,
        finished=True,
    )
