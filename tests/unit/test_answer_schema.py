"""Answers that must fit a schema: what is asked for, what is wrong, and the second try."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from schema.errors import InvalidRequestError, ServiceError
from schema.jobs import Completion, JobState, OpenAIRequest, PromptRequest, Reuse
from tests.stand_ins import claimed_job, final_output
from workers.answer_schema import SECOND_TEMPERATURE, fault_of, schema_of, second_try
from workers.answering import Answerer
from workers.engine.protocols import StoredAnswer, StoredCompletion
from workers.engine.scope import current_scope
from workers.json_schemas import check_schema
from workers.schema_checker import SchemaChecker
from workers.store.records import ClaimedJob

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}}


@pytest.fixture(scope="module")
async def checker() -> AsyncIterator[SchemaChecker]:
    made = SchemaChecker()
    yield made
    await made.aclose()


def chat(**body: Any) -> OpenAIRequest:
    return OpenAIRequest(body={"messages": [{"role": "user", "content": "x"}], **body})


def prompt(**sampling: Any) -> PromptRequest:
    return PromptRequest.model_validate({"prompt": "x", "sampling": sampling})


@pytest.mark.parametrize(
    ("request_", "schema"),
    [
        (chat(), None),
        (chat(response_format={"type": "text"}), None),
        (chat(response_format={"type": "json_object"}), {"type": "object"}),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
            SCHEMA,
        ),
        (chat(structured_outputs={"json": SCHEMA}), SCHEMA),
        (chat(structured_outputs={"regex": "a+"}), None),
        (prompt(), None),
        (prompt(structured_outputs={"json": '{"type": "array"}'}), {"type": "array"}),
        (prompt(structured_outputs={"json_object": True}), {"type": "object"}),
    ],
)
def test_the_schema_of_a_request_is_found(request_: Any, schema: Any) -> None:
    assert schema_of(request_) == schema


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"n": 3}', None),
        ("{}", None),
        ("", "it is not JSON"),
        ("[1]", "[1] is not of type 'object' (at $)"),
        ('{"n": 2}', "2 is less than the minimum of 3 (at $.n)"),
        ('{"n": "' + "x" * 5000 + '"}', "…"),
        ('{"n": NaN}', "it is not JSON"),
    ],
)
async def test_a_fault_is_named_with_its_place(
    text: str, says: str | None, checker: SchemaChecker
) -> None:
    fault = await fault_of(SCHEMA, [Completion(text=text)], checker, namespace="n")
    assert (fault is None) == (says is None)
    assert says is None or (fault is not None and says in fault and len(fault) < 500)


async def test_each_of_several_answers_is_checked_and_tool_calls_are_none(
    checker: SchemaChecker,
) -> None:
    good, bad = Completion(text="{}"), Completion(index=1, text="no", finish_reason="length")
    fault = str(await fault_of(SCHEMA, [good, bad], checker, namespace="n"))
    assert fault.startswith("answer 1 does not fit the schema")
    assert fault.endswith("it was cut at its token limit")
    call = Completion(text="", finish_reason="tool_calls")
    assert await fault_of(SCHEMA, [call], checker, namespace="n") is None
    assert str(await fault_of(SCHEMA, [call, bad], checker, namespace="n")).startswith(
        "answer 1 does"
    )


async def test_nothing_is_fetched_for_a_schema(checker: SchemaChecker) -> None:
    check_schema({"$ref": "#/$defs/x", "$defs": {"x": {"type": "string"}}})
    with pytest.raises(InvalidRequestError, match="refers to what is not in it"):
        await fault_of(
            {"$ref": "http://127.0.0.1:1/x"}, [Completion(text="1")], checker, namespace="n"
        )


def test_the_second_try_has_another_seed() -> None:
    greedy, seeded = second_try(prompt()), second_try(prompt(temperature=1, seed=7))
    assert isinstance(greedy, PromptRequest)
    assert isinstance(seeded, PromptRequest)
    assert (greedy.sampling.seed, greedy.sampling.temperature) == (1, SECOND_TEMPERATURE)
    assert (seeded.sampling.seed, seeded.sampling.temperature) == (8, 1)
    sampled = second_try(chat())
    assert isinstance(sampled, OpenAIRequest)
    assert isinstance(sampled.body["seed"], int)
    assert "temperature" not in sampled.body


class ScriptedLlm:
    """Says what it is told to, and notes how it was asked."""

    errored = False

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.asked: list[tuple[int | None, float, Reuse | None]] = []
        self.made: list[UUID] = []
        self.forgotten: set[UUID] = set()
        self.verdicts: list[asyncio.Future[bool] | None] = []

    async def generate(self, asked: str, params: Any, request_id: str) -> Any:
        scope = current_scope()
        assert scope is not None
        self.asked.append((params.seed, params.temperature, scope.reuse))
        self.verdicts.append(scope.verdict)
        text = self.texts.pop(0)
        answer = StoredAnswer(
            id=uuid4(),
            namespace=scope.namespace,
            fingerprint=request_id.encode(),
            engine=b"",
            model="m",
            completions=(
                StoredCompletion(index=0, text=text, token_ids=(1,), finish_reason="stop"),
            ),
        )
        self.made.append(answer.id)
        metadata = {"provenance": "generated", "answer_id": str(answer.id)}
        yield final_output(
            asked, request_id, text, token_ids=(1,), metadata=metadata, answer=answer
        )

    @property
    def accepted(self) -> list[bool]:
        """Of each answer to a request that bears a schema, whether it may be stored."""
        return [verdict.result() for verdict in self.verdicts if verdict is not None]

    def forget(self, *, namespace: str, answer_ids: frozenset[UUID]) -> int:
        assert answer_ids, "an empty set would be every answer"
        self.forgotten |= answer_ids
        return len(answer_ids)


def claimed(request: PromptRequest, **options: Any) -> ClaimedJob:
    return claimed_job(request.model_dump(mode="json"), options=options)


def answerer(llm: ScriptedLlm, checker: SchemaChecker) -> Answerer:
    return Answerer(llm, None, checker=checker, model="m")  # type: ignore[arg-type]  # as much as it touches


async def test_a_second_answer_that_fits_is_the_one_that_is_kept(checker: SchemaChecker) -> None:
    llm, heard = ScriptedLlm("nonsense", '{"n": 4}'), []

    async def hear(*piece: Any) -> None:
        heard.append(piece)

    outcome = await answerer(llm, checker).answer(
        claimed(prompt(structured_outputs={"json": SCHEMA})), on_text=hear
    )
    assert outcome.result.status is JobState.DONE
    assert outcome.result.text == '{"n": 4}'
    assert heard == [(0, 0, '{"n": 4}')]
    assert "is not JSON" in outcome.result.metadata["schema_retry"]
    assert outcome.answer is not None
    assert outcome.answer.id == llm.made[1]
    assert llm.forgotten == {llm.made[0]}
    assert llm.accepted == [False, True]
    assert llm.asked == [(None, 0.0, None), (1, SECOND_TEMPERATURE, None)]


async def test_an_answer_that_never_fits_fails_and_is_forgotten(checker: SchemaChecker) -> None:
    llm = ScriptedLlm('{"n": 1}', '{"n": 2}')
    sampled = prompt(temperature=1, structured_outputs={"json": SCHEMA})
    outcome = await answerer(llm, checker).answer(claimed(sampled))
    assert outcome.result.status is JobState.FAILED
    assert outcome.result.error is not None
    assert "2 is less than the minimum of 3" in outcome.result.error.message
    assert outcome.answer is None
    assert llm.forgotten == set(llm.made)
    assert llm.accepted == [False, False]
    # The seed of a sampled request's second try is ours: nothing is stored under it.
    assert [reuse for _, _, reuse in llm.asked] == [None, Reuse.OFF]


async def test_a_costly_pattern_fails_its_job_at_once() -> None:
    checker = SchemaChecker(limit_s=1.0)
    llm = ScriptedLlm('"' + "a" * 60 + '!"')
    asked = prompt(structured_outputs={"json": {"pattern": "^(a|a)*$"}})
    try:
        outcome = await answerer(llm, checker).answer(claimed(asked))
    finally:
        await checker.aclose()
    assert outcome.result.status is JobState.FAILED
    assert outcome.result.error is not None
    assert outcome.result.error.type == "InvalidRequestError"
    assert "too costly a pattern" in outcome.result.error.message
    assert outcome.answer is None
    assert llm.forgotten == set(llm.made)
    assert llm.accepted == [False]


async def test_an_answer_that_could_not_be_checked_is_forgotten() -> None:
    checker = SchemaChecker()
    await checker.aclose()
    llm = ScriptedLlm("{}")
    with pytest.raises(ServiceError):
        await answerer(llm, checker).answer(claimed(prompt(structured_outputs={"json": SCHEMA})))
    assert llm.forgotten == set(llm.made)
    assert llm.accepted == [False]


async def test_what_needs_no_schema_is_asked_once(checker: SchemaChecker) -> None:
    llm = ScriptedLlm("anything")
    outcome = await answerer(llm, checker).answer(claimed(prompt()))
    assert outcome.result.text == "anything"
    assert llm.forgotten == set()
    assert llm.verdicts == [None]
