"""An answer of vLLM's handlers that grows: its text is passed on, its pieces become one body.

vLLM streams server-sent events. What they add up to is put into vLLM's own response model, so that
the body of a job is the same whether somebody read it while it grew or not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse

#: Takes pieces of a growing answer: index of the answer, characters before the piece, its text.
OnText = Callable[[int, int, str], Awaitable[None]]

_RESPONSES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionResponse,
    "/v1/completions": CompletionResponse,
}
# Of these vLLM streams nothing, or something that is no text to be read.
_WHOLE_ONLY = ("tools", "functions", "prompt_logprobs", "use_beam_search", "best_of", "echo")
_TEXTS = frozenset({"content", "reasoning", "refusal", "text"})


def streams(url: str, body: dict[str, Any]) -> bool:
    """Whether the answer to a body can be read while it grows.

    Args:
        url: Path of the endpoint.
        body: As an HTTP client would send it.
    """
    return url in _RESPONSES and not any(body.get(name) for name in _WHOLE_ONLY)


def streaming(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body that asks vLLM for a stream, with the count of tokens at its end.

    Args:
        body: Of a request that `streams`.
    """
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


async def gather(url: str, events: AsyncIterator[str], on_text: OnText) -> dict[str, Any]:
    """Read a stream to its end.

    Args:
        url: Path of the endpoint.
        events: As vLLM's handler yields them.
        on_text: Takes each piece of text.

    Returns:
        The body as vLLM gives it without a stream; or vLLM's error object.
    """
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    length: dict[int, int] = {}
    async for event in events:
        data = event.strip().removeprefix("data:").strip()
        if not data or data == "[DONE]":
            continue
        chunk = orjson.loads(data)
        if "error" in chunk:
            return dict(chunk)
        for piece in chunk.pop("choices", ()):
            at = piece["index"]
            text = _take(choices.setdefault(at, {}), piece)
            if text:
                await on_text(at, length.get(at, 0), text)
                length[at] = length.get(at, 0) + len(text)
        chunk.pop("object", None)
        _add(whole, chunk)
    whole["choices"] = [choices[at] for at in sorted(choices)]
    return _RESPONSES[url].model_validate(whole).model_dump(mode="json")


def _take(choice: dict[str, Any], piece: dict[str, Any]) -> str:
    """Add a piece to its choice; return the text that it brought."""
    delta = piece.pop("delta", None)
    if delta is not None:
        piece["message"] = delta
    _add(choice, piece)
    text = piece.get("text") if delta is None else delta.get("content")
    return text if isinstance(text, str) else ""


def _add(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        known = whole.get(name)
        if known is None or value is None:
            if value is not None or name not in whole:
                whole[name] = value
        elif isinstance(value, dict):
            _add(known, value)
        elif isinstance(value, list):
            whole[name] = [*known, *value]
        elif name in _TEXTS:
            whole[name] = known + value
        else:
            whole[name] = value
