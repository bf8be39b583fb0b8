"""vLLM's own OpenAI handlers over the enhanced engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.run_batch import build_endpoint_registry
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.engine.conftest import Equipped
from workers.bundled import bundled_model
from workers.engine import RequestScope

pytestmark = pytest.mark.engine

NAME = "smollm2-135m-instruct"


@pytest.fixture
async def handler(plain: Equipped) -> Any:
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(
        ["--model", str(bundled_model()), "--served-model-name", NAME, "--max-model-len", "2048"]
    )
    registry = await build_endpoint_registry(plain, args)
    return registry["completions"]["handler_getter"]()


def chat(**fields: Any) -> ChatCompletionRequest:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Name one colour."}],
        "temperature": 0,
        "max_completion_tokens": 6,
        **fields,
    }
    return ChatCompletionRequest(**body)


def plain_choices(response: Any) -> list[dict[str, Any]]:
    return [choice.model_dump() for choice in response.choices]


async def test_a_chat_is_answered_and_then_from_the_cache(handler: Any) -> None:
    scope = RequestScope(namespace="chats")
    with scope.active():
        first = await handler(chat())
        again = await handler(chat())
    assert first.choices[0].message.content
    assert plain_choices(first) == plain_choices(again)
    assert first.usage.completion_tokens == again.usage.completion_tokens
    assert [entry.metadata["provenance"] for entry in scope.report.entries] == [
        "generated",
        "exact",
    ]


async def test_identical_chats_at_once_are_one_generation(handler: Any, plain: Equipped) -> None:
    scope = RequestScope()
    with scope.active():
        answers = await asyncio.gather(*(handler(chat(max_completion_tokens=9)) for _ in range(8)))
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.id for answer in answers}) == 8
    assert plain.stats()["generated"] == 1


async def test_a_streamed_chat_replays_as_a_stream(handler: Any) -> None:
    async def text_of(**fields: Any) -> str:
        parts = []
        async for line in await handler(chat(stream=True, **fields)):
            data = line.removeprefix("data: ").strip()
            if data and data != "[DONE]":
                choices = json.loads(data)["choices"]
                parts += [choice["delta"].get("content") or "" for choice in choices]
        return "".join(parts)

    whole = (await handler(chat())).choices[0].message.content
    assert await text_of() == whole
    assert await text_of(max_completion_tokens=5) == await text_of(max_completion_tokens=5)


async def test_logprobs_and_structured_output_are_replayed(handler: Any) -> None:
    for fields in (
        {"logprobs": True, "top_logprobs": 2},
        {"structured_outputs": {"choice": ["red", "green"]}},
    ):
        scope = RequestScope()
        with scope.active():
            first = await handler(chat(**fields))
            again = await handler(chat(**fields))
        assert plain_choices(first) == plain_choices(again)
        assert scope.report.entries[1].metadata["cached"]


async def test_a_bad_request_is_the_handlers_own_error(handler: Any) -> None:
    response = await handler(chat(model="another"))
    assert response.error.code == 404
