"""vLLM's own OpenAI handlers over our engine, called with the body of a job.

They are set up by vLLM's `init_app_state`, so tools, structured output, embeddings and scores work
as in vLLM's server.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.datastructures import State
from starlette.responses import Response
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
from vllm.entrypoints.serve import create_error_response
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from schema.errors import shown
from workers import handler_stream

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from workers.handler_stream import OnText

Handler = Callable[[Any], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class HandlerAnswer:
    """What a handler made of a body."""

    status_code: int  # HTTP
    body: dict[str, Any]  # the response, or vLLM's error object

    @property
    def ok(self) -> bool:
        """Whether it is an answer rather than an error."""
        return self.status_code < 400


class OpenAIHandlers:
    """The endpoints that the served model supports, by URL.

    Args:
        state: As `init_app_state` filled it.
    """

    def __init__(self, state: State) -> None:
        chat = getattr(state, "openai_serving_chat", None)
        completion = getattr(state, "openai_serving_completion", None)
        embedding = getattr(state, "serving_embedding", None)
        scores = getattr(state, "serving_scores", None)
        score = (TypeAdapter(ScoreRequest), scores)
        rerank = (TypeAdapter(RerankRequest), scores)
        self._models = getattr(state, "openai_serving_models", None)
        self._routes: dict[str, tuple[TypeAdapter[Any], Handler | None]] = {
            "/v1/chat/completions": (
                TypeAdapter(ChatCompletionRequest),
                chat and chat.create_chat_completion,
            ),
            "/v1/completions": (
                TypeAdapter(CompletionRequest),
                completion and completion.create_completion,
            ),
            "/v1/embeddings": (TypeAdapter(EmbeddingRequest), embedding),
            "/v1/score": score,
            "/score": score,
            "/v1/rerank": rerank,
            "/v2/rerank": rerank,
            "/rerank": rerank,
        }

    @classmethod
    async def over(cls, llm: AsyncLLM, args: Namespace) -> OpenAIHandlers:
        """Set the handlers up.

        Args:
            llm: The engine.
            args: Of vLLM's API server, as its own parser returns them.
        """
        state = State()
        await init_app_state(llm, state, args, await llm.get_supported_tasks())
        return cls(state)

    def adapter(self, name: str) -> LoRARequest | None:
        """Return what asks for a LoRA module that vLLM was started with; None for the model.

        Args:
            name: Served name.
        """
        found: LoRARequest | None = getattr(self._models, "lora_requests", {}).get(name)
        return found

    async def answer(
        self, url: str, body: dict[str, Any], *, on_text: OnText | None = None
    ) -> HandlerAnswer:
        """Answer one body.

        Args:
            url: Path of the endpoint.
            body: As an HTTP client would send it.
            on_text: Takes the text while it grows, where vLLM can stream it.

        Returns:
            The response, or the error that vLLM's server would give.

        Raises:
            EngineDeadError: The engine is gone.
            EngineGenerateError: vLLM failed on this request.
        """
        if url not in self._routes:
            return _error(404, "NotFoundError", f"no endpoint {url}")
        request_type, handler = self._routes[url]
        if handler is None:
            return _error(404, "NotFoundError", f"the served model does not support {url}")
        grows = on_text is not None and handler_stream.streams(url, body)
        try:
            asked = handler_stream.streaming(body) if grows else body
            response = await handler(request_type.validate_python(asked))
            if on_text is not None and isinstance(response, AsyncIterator):
                return _checked(await handler_stream.gather(url, response, on_text))
        except (EngineDeadError, EngineGenerateError):
            raise
        except ValidationError as exc:
            return _error(400, "BadRequestError", _first_fault(exc))
        except Exception as exc:  # noqa: BLE001  vLLM maps every error to a response, as its server
            return _answer_of(create_error_response(exc))
        return _answer_of(response)


def _answer_of(response: Any) -> HandlerAnswer:
    if isinstance(response, Response):
        return HandlerAnswer(
            status_code=response.status_code, body=json.loads(bytes(response.body))
        )
    if not isinstance(response, BaseModel):
        return _error(400, "BadRequestError", "the request must not be sent in stream mode")
    return _checked(response.model_dump(mode="json"))


def _checked(body: dict[str, Any]) -> HandlerAnswer:
    error = body.get("error")
    if isinstance(error, dict):
        return HandlerAnswer(status_code=int(error.get("code") or 500), body=body)
    return HandlerAnswer(status_code=200, body=body)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in fault["loc"])
    return f"{field}: {fault['msg']}, not {shown(fault['input'])}" if field else fault["msg"]


def _error(code: int, kind: str, message: str) -> HandlerAnswer:
    return HandlerAnswer(
        status_code=code, body={"error": {"message": message, "type": kind, "code": code}}
    )
