"""What is to be done with one request: rendered, keyed, and judged for reuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from cachetools import LRUCache
from vllm import PoolingParams, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest

from schema.jobs import Reuse
from workers.engine.config import Features
from workers.engine.fingerprint import (
    fingerprint,
    lora_digest,
    params_digest,
    scope_digest,
)
from workers.engine.last_turn import LastTurn
from workers.engine.prompts import Prompts, Seen
from workers.engine.scope import RequestScope

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

#: Parameters whose digest is kept.
_KEPT_PARAMS = 1024

Params: TypeAlias = SamplingParams | PoolingParams

_quick = msgspec.msgpack.Encoder()


@dataclass(frozen=True, kw_only=True)
class RequestPlan:
    """One request, ready to be answered."""

    call: dict[str, Any]  # arguments for AsyncLLM.add_request
    text: str | None = None  # the prompt's text, if it has one
    named: str | None = None  # what it asks, as its scope says
    turns: LastTurn | None = None  # finds what it asks where its scope does not say
    prompt_token_ids: tuple[int, ...] = ()
    key: bytes | None = None  # fingerprint; None when the request may not be reused
    not_reusable: str | None = None  # why there is no key
    engine: bytes = b""  # what the digest of the scope is made of
    context: bytes = b""
    params_digest: bytes = b""
    lora: str | None = None
    besides: Mapping[str, Any] = field(default_factory=dict)  # what counts besides the text

    @property
    def params(self) -> Params:
        """VLLM's parameters, as the caller gave them."""
        params: Params = self.call["params"]
        return params

    @property
    def streams(self) -> bool:
        """Whether the caller reads the answer while it grows."""
        return self.params.output_kind != RequestOutputKind.FINAL_ONLY

    @property
    def asked(self) -> str | None:
        """What it asks: the text that is analysed, and compared with others."""
        if self.named is not None:
            return self.named
        return self._last_turn[0] if self._last_turn is not None else self.text

    @cached_property
    def _last_turn(self) -> tuple[str, str] | None:
        return None if self.turns is None or self.text is None else self.turns.of(self.text)

    @cached_property
    def scope_digest(self) -> bytes:
        """What must be equal, beside the namespace, for reuse by meaning."""
        besides = self.besides
        if self.named is None and self._last_turn is not None:
            besides = {**besides, "around": self._last_turn[1]}
        return scope_digest(
            engine=self.engine,
            context=self.context,
            params=self.params_digest,
            lora=self.lora,
            besides=besides,
        )

    @property
    def not_comparable(self) -> str | None:
        """Why the answer to a prompt of the same meaning would not do, or None when it would."""
        if isinstance(self.params, PoolingParams):
            return "what is computed of a text is of its very words"
        if self.params.prompt_logprobs is not None:
            return "log probabilities of a prompt are of its very words"
        return None


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


class Planner:
    """Plans requests.

    Digests of parameters are kept, since making them is much of what an answer from memory costs.

    Args:
        llm: Whose renderer.
        engine: Digest of the engine's identity.
        features: What is switched on.
    """

    def __init__(self, llm: AsyncLLM, *, engine: bytes, features: Features) -> None:
        self.engine = engine
        self._features = features
        self._prompts = Prompts(llm)
        self._params: LRUCache[tuple[type[Any], bytes], bytes] = LRUCache(_KEPT_PARAMS)
        self._adapters: dict[int, str] = {}  # content by vLLM's number, as first seen

    async def plan(self, call: dict[str, Any], *, scope: RequestScope | None) -> RequestPlan:
        """Render and key a request.

        Args:
            call: Arguments of `add_request` by name.
            scope: What the caller asked for; None where a scope is needed and there was none.

        Raises:
            VLLMValidationError: As vLLM raises it for a prompt that it cannot take.
        """
        if isinstance(call["prompt"], AsyncGenerator):
            return RequestPlan(call=call, not_reusable="streaming input is passed through")
        if isinstance(call["prompt"], EngineCoreRequest):
            return RequestPlan(call=call, not_reusable="a raw engine request is passed through")
        seen = await self._prompts.seen(call)
        adapter: LoRARequest | None = call.get("lora_request")
        # Beside the loop: an adapter that is new has to be read to its end.
        lora = None if adapter is None else await asyncio.to_thread(lora_digest, adapter)
        loaded = adapter is None or self._is_loaded(adapter, lora or "")
        plan = RequestPlan(
            call=seen.call,
            text=call.get("prompt_text") or seen.rendered.get("prompt"),
            named=None if scope is None else scope.text,
            turns=self._prompts.turns,
            prompt_token_ids=seen.ids,
            not_reusable=self._why_not(seen, scope, loaded=loaded),
        )
        if plan.not_reusable is not None or scope is None:
            return plan
        return self._keyed(plan, seen, scope, lora)

    def _why_not(self, seen: Seen, scope: RequestScope | None, *, loaded: bool) -> str | None:
        """Return why a request is neither answered from the cache nor stored, or None."""
        if scope is None:
            return "no request scope"
        if (reason := why_not_reusable(seen.call["params"], scope, self._features)) is not None:
            return reason
        kind = seen.rendered.get("type")
        if kind == "multimodal" and not self._prompts.media_are_hashed():
            return "with both of its media caches off, vLLM takes no hash of media"
        if seen.parts is None:
            return f"a prompt of type {kind!r} has no exact identity"
        return None if loaded else "the adapter's files have changed since vLLM loaded them"

    def _keyed(
        self, plan: RequestPlan, seen: Seen, scope: RequestScope, lora: str | None
    ) -> RequestPlan:
        """Give a request that may be reused its fingerprint, and what its neighbours must share."""
        parts = seen.parts or {}
        digest = self._digest(plan.params)
        extra = {
            name: seen.call[name]
            for name in ("reasoning_ended", "reasoning_parser_kwargs")
            if seen.call.get(name) is not None
        }
        besides = {name: part for name, part in parts.items() if name != "ids"}
        if seen.tokenization:
            besides["tokenization"] = seen.tokenization
        return replace(
            plan,
            key=fingerprint(
                namespace=scope.namespace,
                engine=self.engine,
                prompt=parts,
                params=digest,
                lora=lora,
                extra=extra,
            ),
            engine=self.engine,
            context=scope.context,
            params_digest=digest,
            lora=lora,
            besides={**besides, **extra},
        )

    def _is_loaded(self, adapter: LoRARequest, content: str) -> bool:
        """Whether vLLM answers by this content: it reads an adapter again only when told to."""
        if adapter.load_inplace:
            self._adapters[adapter.lora_int_id] = content
        return self._adapters.setdefault(adapter.lora_int_id, content) == content

    def _digest(self, params: Params) -> bytes:
        try:
            # The encoded fields decide the digest, and encoding is a tenth of its cost.
            name = (type(params), _quick.encode(params))
        except (TypeError, NotImplementedError):  # it holds what msgspec cannot write
            return params_digest(params)
        digest = self._params.get(name)
        if digest is None:
            digest = self._params[name] = params_digest(params)
        return digest
