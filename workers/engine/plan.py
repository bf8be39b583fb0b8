"""What is to be done with one request: rendered, keyed, and judged for reuse."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm import PoolingParams, SamplingParams
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest

from schema.jobs import Reuse
from workers.engine.config import Features
from workers.engine.fingerprint import (
    canonical_params,
    fingerprint,
    lora_digest,
    prompt_parts,
    scope_digest,
)
from workers.engine.scope import RequestScope

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

#: Up to here a text is tokenized where it stands; beyond, on the renderer's threads, since a
#: tokenizer takes about a millisecond for this many characters and the loop must not wait.
_INLINE_CHARS = 4_000

Params = SamplingParams | PoolingParams


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """One request, ready to be answered."""

    call: dict[str, Any]  # arguments for AsyncLLM.add_request
    text: str | None = None  # the prompt's text, if it has one
    prompt_token_ids: tuple[int, ...] = ()
    key: bytes | None = None  # fingerprint; None when the request may not be reused
    scope_digest: bytes | None = None
    not_reusable: str | None = None  # why there is no key

    @property
    def params(self) -> Params:
        """VLLM's parameters, as the caller gave them."""
        params: Params = self.call["params"]
        return params

    @property
    def streams(self) -> bool:
        """Whether the caller reads the answer while it grows."""
        return self.params.output_kind != RequestOutputKind.FINAL_ONLY


def why_not_reusable(params: Params, scope: RequestScope, features: Features) -> str | None:
    """Return why a request is neither answered from the cache nor stored, or None.

    Args:
        params: vLLM's.
        scope: What the caller asked for.
        features: What is switched on.
    """
    if not features.exact:
        return "exact reuse is switched off"
    if scope.reuse == Reuse.OFF:
        return "the caller asked for no reuse"
    if isinstance(params, PoolingParams):
        return None
    sampled = params.temperature > 0 and params.seed is None
    if sampled and scope.reuse != Reuse.ALWAYS:
        return "sampled without a seed"
    if params.extra_args:
        return "it carries extra arguments"
    if params.flat_logprobs:
        return "flat log probabilities are not stored"
    return None


async def render(llm: AsyncLLM, prompt: Any, kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return a prompt as vLLM's renderer makes it: token ids, and hashes of media.

    Args:
        llm: Whose renderer.
        prompt: A string, token ids, or a prompt dictionary.
        kwargs: For the tokenizer.

    Raises:
        VLLMValidationError: The prompt is empty, too long, or of a wrong form.
    """
    renderer = llm.renderer
    parsed = parse_model_prompt(llm.model_config, prompt)
    params = renderer.default_cmpl_tok_params.with_kwargs(**(kwargs or {}))
    text = parsed.get("prompt") if isinstance(parsed, dict) else None
    media = isinstance(parsed, dict) and "multi_modal_data" in parsed
    if not media and len(text or "") <= _INLINE_CHARS:
        (rendered,) = renderer.render_cmpl([parsed], params)
    else:
        (rendered,) = await renderer.render_cmpl_async([parsed], params)
    result: Mapping[str, Any] = rendered
    return result


async def plan(
    llm: AsyncLLM,
    call: dict[str, Any],
    *,
    scope: RequestScope | None,
    engine: bytes,
    features: Features,
) -> RequestPlan:
    """Render and key a request.

    Args:
        llm: The engine.
        call: Arguments of `add_request` by name.
        scope: What the caller asked for; None where a scope is needed and there was none.
        engine: Digest of the engine's identity.
        features: What is switched on.

    Raises:
        VLLMValidationError: As vLLM raises it for a prompt that it cannot take.
    """
    prompt, params = call["prompt"], call["params"]
    if isinstance(prompt, (AsyncGenerator, EngineCoreRequest)):
        kind = "streaming input" if isinstance(prompt, AsyncGenerator) else "a raw engine request"
        return RequestPlan(call=call, not_reusable=f"{kind} is passed through")
    if not (isinstance(prompt, dict) and "type" in prompt):
        call = {**call, "prompt": await render(llm, prompt, call.get("tokenization_kwargs"))}
        # Tokenized already: vLLM would warn of arguments it cannot use any more.
        call.pop("tokenization_kwargs", None)
    rendered: Mapping[str, Any] = call["prompt"]
    text = call.get("prompt_text") or rendered.get("prompt")
    ids = tuple(rendered.get("prompt_token_ids") or ())
    if scope is None:
        return RequestPlan(call=call, text=text, not_reusable="no request scope")
    parts = prompt_parts(rendered)
    reason = why_not_reusable(params, scope, features)
    if parts is None:
        reason = reason or f"a prompt of type {rendered.get('type')!r} has no exact identity"
    if reason is not None or parts is None:
        return RequestPlan(call=call, text=text, prompt_token_ids=ids, not_reusable=reason)
    canonical, lora = canonical_params(params), lora_digest(call.get("lora_request"))
    extra = {
        name: call[name]
        for name in ("reasoning_ended", "reasoning_parser_kwargs")
        if call.get(name) is not None
    }
    return RequestPlan(
        call=call,
        text=text,
        prompt_token_ids=ids,
        key=fingerprint(
            namespace=scope.namespace,
            engine=engine,
            prompt=parts,
            params=canonical,
            lora=lora,
            extra=extra,
        ),
        scope_digest=scope_digest(
            engine=engine, context=scope.context, params=canonical, lora=lora
        ),
    )
