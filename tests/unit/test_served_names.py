"""A job is answered under the name that it asks for: the model's, a further one, an adapter's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from schema.jobs import JobState
from tests.stand_ins import claimed_job, final_output
from workers.answering import Answerer
from workers.handlers import HandlerAnswer
from workers.schema_checker import SchemaChecker

ADAPTER = object()


class Played:
    """The engine, and the handlers over it; both note what they are asked for."""

    errored = False

    def __init__(self) -> None:
        self.adapters: list[Any] = []
        self.bodies: list[dict[str, Any]] = []

    async def generate(
        self, prompt: str, _params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        """Answer."""
        self.adapters.append(lora_request)
        yield final_output(prompt, request_id, "A field.", metadata={"provenance": "generated"})

    def adapter(self, name: str) -> Any:
        """Know one."""
        return ADAPTER if name == "adapter" else None

    async def answer(self, _url: str, body: dict[str, Any], **_: Any) -> HandlerAnswer:
        """Answer."""
        self.bodies.append(body)
        return HandlerAnswer(status_code=200, body={"choices": []})


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.fixture
def answerer(played: Played) -> Answerer:
    checker = SchemaChecker()
    return Answerer(played, played, checker=checker, model="m", others=("alias", "adapter"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "asked"), [("m", None), ("alias", None), ("adapter", ADAPTER), ("unknown", None)]
)
async def test_a_prompt_goes_to_the_adapter_that_it_names(
    answerer: Answerer, played: Played, model: str, asked: Any
) -> None:
    job = claimed_job({"kind": "prompt", "prompt": "p"}, model=model)
    assert (await answerer.answer(job)).result.status is JobState.DONE
    assert played.adapters == [asked]


def body(named: str | None) -> dict[str, Any]:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "p"}]}
    if named is not None:
        asked["model"] = named
    return {"kind": "openai", "url": "/v1/chat/completions", "body": asked}


@pytest.mark.parametrize("named", [None, "", "own"])
@pytest.mark.parametrize("model", ["m", "alias", "adapter"])
async def test_a_body_goes_to_the_model_of_its_queue(
    answerer: Answerer, played: Played, model: str, named: str | None
) -> None:
    job = claimed_job(body(model if named == "own" else named), model=model)
    assert (await answerer.answer(job)).result.status is JobState.DONE
    assert [asked["model"] for asked in played.bodies] == [model]


async def test_a_body_that_names_another_model_than_its_job_is_refused(
    answerer: Answerer, played: Played
) -> None:
    for model, named in (("m", "adapter"), ("adapter", "m"), ("alias", "unknown")):
        outcome = await answerer.answer(claimed_job(body(named), model=model))
        assert outcome.result.status is JobState.FAILED
        assert outcome.result.error is not None
        assert outcome.result.error.type == "UnknownModelError"
        assert outcome.result.error.status_code == 404
    assert played.bodies == []
