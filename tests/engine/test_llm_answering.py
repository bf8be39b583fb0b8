"""Jobs through the real engine: streams of OpenAI bodies, and answers that must fit a schema."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from schema.jobs import JobState
from tests.engine.conftest import Equip, Equipped
from tests.stand_ins import claimed_job
from workers.answering import Answerer
from workers.bundled import bundled_model
from workers.engine import HandlerConfig
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.nlp import SpacyAnalyser
from workers.handlers import OpenAIHandlers
from workers.schema_checker import SchemaChecker
from workers.store.answers import PostgresAnswers
from workers.store.records import ClaimedJob

pytestmark = pytest.mark.engine

NAME = "smollm2-135m-instruct"
URLS = ("/v1/chat/completions", "/v1/completions")


def claimed(request: dict[str, Any], **options: Any) -> ClaimedJob:
    return claimed_job(request, namespace="answering", model=NAME, options=options)


def body_of(url: str, **fields: Any) -> dict[str, Any]:
    asked = {"temperature": 0, "max_tokens": 8, **fields}
    if "chat" in url:
        asked["messages"] = [{"role": "user", "content": "Name one colour."}]
    else:
        asked["prompt"] = "One colour is"
    return {"kind": "openai", "url": url, "body": asked}


@asynccontextmanager
async def answering(llm: Equipped) -> AsyncIterator[Answerer]:
    checker = SchemaChecker()
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(
        ["--model", str(bundled_model()), "--served-model-name", NAME, "--max-model-len", "2048"]
    )
    yield Answerer(llm, await OpenAIHandlers.over(llm, args), checker=checker, model=NAME)
    await checker.aclose()


@pytest.fixture
async def answerer(plain: Equipped) -> AsyncIterator[Answerer]:
    async with answering(plain) as answerer:
        yield answerer


class Heard:
    """Collects the pieces of growing answers."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int, str]] = []

    async def __call__(self, index: int, offset: int, text: str) -> None:
        assert offset == len(self.text(index))
        self.pieces.append((index, offset, text))

    def text(self, index: int = 0) -> str:
        return "".join(text for at, _, text in self.pieces if at == index)


@pytest.mark.parametrize("url", URLS)
async def test_a_body_is_the_same_whether_it_was_streamed_or_not(
    answerer: Answerer, url: str
) -> None:
    logprobs = True if "chat" in url else 2
    request = body_of(url, logprobs=logprobs, max_tokens=24, ignore_eos=True)
    heard, again = Heard(), Heard()
    streamed = await answerer.answer(claimed(request), on_text=heard)
    whole = await answerer.answer(claimed(request))
    replayed = await answerer.answer(claimed(request), on_text=again)
    assert streamed.result.status is JobState.DONE, streamed.result.error
    assert len(heard.pieces) > 1
    assert heard.text() == again.text() == whole.result.text == streamed.result.text
    assert streamed.result.metadata["provenance"] == "generated"
    assert replayed.result.metadata["provenance"] == "exact"
    assert streamed.result.metadata["tokens"]["completion_tokens"] == 24
    assert replayed.result.metadata["engine_s"] == streamed.result.metadata["engine_s"] > 0
    bodies = [outcome.result.body for outcome in (streamed, whole, replayed)]
    for body in bodies:
        assert body is not None
        for name in ("id", "created"):
            body.pop(name)
    assert bodies[0] == bodies[1] == bodies[2]
    assert bodies[0] is not None
    assert bodies[0]["usage"]["completion_tokens"] == 24


async def test_of_a_chat_the_last_turn_is_compared_and_those_before_must_match(
    equip: Equip, analyser: SpacyAnalyser, embedder: MiniLmEmbedder, answer_store: PostgresAnswers
) -> None:
    llm = equip(
        HandlerConfig(enrichment_wait_s=30),
        analyser=analyser,
        embedder=embedder,
        store=answer_store,
    )

    def chat(asked: str, *, system: str = "You are a baker.", **fields: Any) -> ClaimedJob:
        turns = [
            {"role": "system", "content": system},
            {"role": "user", "content": "Good morning."},
            {"role": "assistant", "content": "Good morning!"},
            {"role": "user", "content": asked},
        ]
        body = {"temperature": 0, "max_tokens": 48, "ignore_eos": True, "messages": turns}
        request = {"kind": "openai", "url": URLS[0], "body": {**body, **fields}}
        return claimed(request, reuse="semantic")

    async with answering(llm) as answerer:
        first = await answerer.answer(chat("How do I bake sourdough bread?"))
        assert first.answer is not None
        await answer_store.put(first.answer)
        meant = "How can I bake sourdough bread?"
        again = await answerer.answer(chat(meant))
        assert again.result.metadata["provenance"] == "semantic"
        assert again.result.text == first.result.text
        assert (again.answer_id, again.answer) == (first.answer.id, None)
        assert again.fingerprint is None  # it is the answer to other words
        for other in (
            chat(meant, system="You are a chemist."),
            chat(meant, max_tokens=47),
            chat("How do I bake sourdough rolls?"),
        ):
            outcome = await answerer.answer(other)
            assert outcome.result.metadata["provenance"] == "generated"


async def test_several_choices_are_streamed_apart(answerer: Answerer) -> None:
    heard = Heard()
    request = body_of(URLS[0], n=2, temperature=0.8, seed=3)
    outcome = await answerer.answer(claimed(request), on_text=heard)
    assert [heard.text(0), heard.text(1)] == [item.text for item in outcome.result.outputs]


async def test_an_error_of_a_streamed_body_is_the_handlers_own(answerer: Answerer) -> None:
    for wrong in ({"temperature": -1}, {"max_tokens": 0}, {"stop_token_ids": "x"}):
        plain = await answerer.answer(claimed(body_of(URLS[0], **wrong)))
        streamed = await answerer.answer(claimed(body_of(URLS[0], **wrong)), on_text=Heard())
        assert plain.result.error is not None
        assert streamed.result.error == plain.result.error


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.mark.parametrize("url", URLS)
async def test_an_answer_that_fits_is_stored_like_any_other(answerer: Answerer, url: str) -> None:
    request, heard = body_of(url, response_format=form(SCHEMA), max_tokens=40), Heard()
    first = await answerer.answer(claimed(request))
    again = await answerer.answer(claimed(request), on_text=heard)
    assert first.result.status is JobState.DONE, first.result.error
    assert json.loads(first.result.text or "")["colour"] in {"red", "green"}
    assert again.result.metadata["provenance"] == "exact"
    assert heard.text() == first.result.text


@pytest.mark.parametrize(
    "request_",
    [
        body_of(URLS[0], response_format=form(SCHEMA), max_tokens=3),
        {
            "kind": "prompt",
            "prompt": "A colour:",
            "sampling": {"max_tokens": 3, "structured_outputs": {"json": SCHEMA}},
        },
        {
            "kind": "prompt",
            "prompt": "A colour:",
            "sampling": {"max_tokens": 3, "temperature": 1, "structured_outputs": {"json": SCHEMA}},
        },
    ],
    ids=["chat", "greedy prompt", "sampled prompt"],
)
async def test_an_answer_that_does_not_fit_is_tried_twice_and_kept_nowhere(
    answerer: Answerer, plain: Equipped, request_: dict[str, Any]
) -> None:
    heard = Heard()
    outcome = await answerer.answer(claimed(request_), on_text=heard)
    assert outcome.result.status is JobState.FAILED
    assert outcome.result.error is not None
    assert outcome.result.error.type == "AnswerSchemaError"
    assert "does not fit the schema: it is not JSON" in outcome.result.error.message
    assert "cut at its token limit" in outcome.result.error.message
    assert not outcome.result.error.retryable
    assert outcome.answer is None
    assert len(plain.memory) == 0
    assert heard.pieces == []


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "nonsense"}, "is not a JSON schema"),
        ([], "must be a JSON schema"),
        ({"$ref": "https://example.org/x.json"}, "refers to what is not in it"),
    ],
)
async def test_what_is_no_schema_is_refused(answerer: Answerer, schema: Any, says: str) -> None:
    outcome = await answerer.answer(claimed(body_of(URLS[0], response_format=form(schema))))
    assert outcome.result.error is not None
    assert outcome.result.error.status_code == 400
    assert says in outcome.result.error.message
