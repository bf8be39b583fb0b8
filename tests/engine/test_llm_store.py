"""The durable tier, reuse by meaning and shadow mode, over real Postgres, spaCy and MiniLM."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from schema.errors import DatabaseUnavailableError
from schema.jobs import Reuse, Verify
from tests.engine.conftest import (
    PLAIN,
    Equip,
    Equipped,
    final_of,
    greedy,
    idle,
    joined,
    outputs_of,
    until,
)
from workers.engine import HandlerConfig, RequestScope
from workers.engine.config import CacheConfig, Features, SimilarityConfig
from workers.engine.protocols import StoredAnswer
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.neighbours import Considered
from workers.enrich.nlp import SpacyAnalyser
from workers.store.answers import PostgresAnswers
from workers.store.database import Database

pytestmark = pytest.mark.engine

ALL_ON = HandlerConfig(enrichment_wait_s=30)
ASKED, MEANT = "How do I bake sourdough bread?", "How can I bake sourdough bread?"
SEMANTIC = Reuse.SEMANTIC


class Outage:
    """A store whose database can be taken away."""

    def __init__(self, store: PostgresAnswers) -> None:
        self.down = False
        self.asked = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        if self.down:
            msg = "Postgres cannot be reached"
            raise DatabaseUnavailableError(msg)
        return getattr(self._store, name)


def full(max_tokens: int) -> SamplingParams:
    """Return greedy parameters of an answer that has all its tokens."""
    return greedy(max_tokens, ignore_eos=True)


async def settled(llm: Equipped) -> None:
    """Wait until what runs beside requests has ended."""
    await until(lambda: llm.stats()["side_tasks"] == 0)


@pytest.fixture
def everything(
    equip: Equip, analyser: SpacyAnalyser, embedder: MiniLmEmbedder, answer_store: PostgresAnswers
) -> Equipped:
    return equip(ALL_ON, analyser=analyser, embedder=embedder, store=answer_store)


async def test_an_answer_outlives_the_memory(equip: Equip, answer_store: PostgresAnswers) -> None:
    llm = equip(PLAIN, store=answer_store)
    params = SamplingParams(
        n=2, temperature=0.7, seed=3, max_tokens=5, logprobs=1, output_kind=RequestOutputKind.DELTA
    )
    made = await outputs_of(llm, "Outlive", params)
    await settled(llm)
    assert llm.forget() == 1
    again = await outputs_of(llm, "Outlive", params, "again")
    assert again[-1].metadata["tier"] == "store"
    assert again[-1].metadata["cached"]
    assert again[-1].metadata["processing_time"]["look_up"] > 0
    assert joined(made, RequestOutputKind.DELTA) == joined(again, RequestOutputKind.DELTA)
    third = await outputs_of(llm, "Outlive", params, "third")
    assert third[-1].metadata["tier"] == "memory"
    stats = llm.stats()
    rates = {"exact/memory": 1 / 3, "exact/store": 1 / 3, "coalesced": 0}
    assert stats["hit_rates"] == pytest.approx(rates)
    assert stats["hit_rate"] == pytest.approx(2 / 3)
    assert {name: took["times"] for name, took in stats["stages"].items()} == {
        "look_up": 2,
        "generate": 1,
        "total": 3,
    }
    # Another engine of the same identity, in another process so to say.
    other = await outputs_of(equip(PLAIN, store=answer_store), "Outlive", params)
    assert other[-1].metadata["source_answer_id"] == again[-1].metadata["source_answer_id"]


async def test_what_was_answered_is_stored_though_the_engine_is_closed_at_once(
    equip: Equip, answer_store: PostgresAnswers
) -> None:
    """A program that asks one thing and ends; what still hangs then is not waited for."""

    class Hanging:
        name = "hanging"

        async def enrich(self, text: str, *, namespace: str) -> Any:
            await asyncio.Event().wait()

        async def aclose(self) -> None:
            """Nothing runs."""

    config = HandlerConfig(features=Features(nlp=False, similarity=False))
    llm = equip(config, store=answer_store, plugins=(Hanging(),))
    scope = RequestScope()
    with scope.active():
        output = await final_of(llm, "And good bye", greedy(3))
    assert output.metadata["late"] == ["plugin:hanging"]
    await llm.aclose()
    answer = scope.report.entries[0].answer
    assert answer is not None
    assert await answer_store.by_id("default", answer.id) is not None


async def test_two_workers_generate_the_same_once(
    equip: Equip, answer_store: PostgresAnswers
) -> None:
    patient = PLAIN.model_copy(update={"cache": CacheConfig(flight_wait_s=60)})
    workers = [equip(patient, store=answer_store) for _ in range(3)]
    finals = await asyncio.gather(
        *(final_of(llm, "One of us", full(40), f"w{i}") for i, llm in enumerate(workers))
    )
    assert len({final.text for final in finals}) == 1
    made = sorted(final.metadata["provenance"] for final in finals)
    assert made == ["exact", "exact", "generated"]
    assert sum(llm.stats()["generated"] for llm in workers) == 1
    waited = [final for final in finals if final.metadata["cached"]]
    assert all(final.metadata["processing_time"]["other_worker"] > 0 for final in waited)


async def test_a_worker_that_gives_up_lets_the_other_generate(
    equip: Equip, answer_store: PostgresAnswers
) -> None:
    first, second = (equip(PLAIN, store=answer_store) for _ in range(2))
    collector = await first.add_request("first", "Given up", full(1000))
    waiting = asyncio.create_task(final_of(second, "Given up", full(4)))
    assert (await waiting).metadata["provenance"] == "generated"  # other parameters do not wait
    waiting = asyncio.create_task(final_of(second, "Given up", full(1000), "second"))
    await until(lambda: second.stats()["flights"] == 1)
    await first.abort("first")
    collector.close()
    await until(lambda: second.get_num_unfinished_requests() == 1)
    await until(lambda: first.stats()["side_tasks"] == 0)
    await second.abort("second")
    assert (await waiting).outputs[0].finish_reason == "abort"


async def test_the_wait_for_another_worker_is_bounded(
    equip: Equip, answer_store: PostgresAnswers
) -> None:
    """It is at it still, and this one generates too."""
    hasty = PLAIN.model_copy(update={"cache": CacheConfig(flight_wait_s=0.2)})
    first, second = equip(PLAIN, store=answer_store), equip(hasty, store=answer_store)
    collector = await first.add_request("first", "Slow elsewhere", full(1500))
    await until(lambda: first.get_num_unfinished_requests() == 1)
    waiting = asyncio.create_task(final_of(second, "Slow elsewhere", full(1500), "second"))
    await until(lambda: second.get_num_unfinished_requests() == 2)
    await second.abort("second")
    assert (await waiting).metadata["provenance"] == "generated"
    await first.abort("first")
    collector.close()


async def test_a_deferred_scope_stores_by_itself(
    equip: Equip, answer_store: PostgresAnswers
) -> None:
    llm = equip(PLAIN, store=answer_store)
    scope = RequestScope(deferred=True)
    with scope.active():
        await final_of(llm, "Deferred", greedy(4))
    await settled(llm)
    (entry,) = scope.report.entries
    assert entry.answer is not None
    assert not entry.stored
    assert await answer_store.by_id("default", entry.answer.id) is None
    await answer_store.put(entry.answer)
    llm.forget()
    with scope.active():
        assert (await final_of(llm, "Deferred", greedy(4))).metadata["tier"] == "store"
    assert scope.report.entries[1].stored


async def test_neighbours_are_named_and_analyses_stored(everything: Equipped) -> None:
    first = await final_of(everything, ASKED, greedy(8))
    await settled(everything)
    second = await final_of(everything, MEANT, greedy(8))
    assert second.metadata["errors"] == {}
    assert not second.metadata["cached"]
    (near,) = second.metadata["similar"]
    assert near["prompt"] == ASKED
    assert near["answer_id"] == first.metadata["answer_id"]
    assert near["similarity"] > 0.9
    await settled(everything)
    everything.forget()
    again = await final_of(everything, MEANT, greedy(8))
    assert again.metadata["tier"] == "store"
    assert again.metadata["nlp_result"] == second.metadata["nlp_result"]
    assert again.metadata["similar"] == second.metadata["similar"]


async def test_each_clause_has_its_own_neighbours(everything: Equipped) -> None:
    for prompt in (ASKED, "Who wrote Middlemarch?"):
        await final_of(everything, prompt, greedy(3))
    await settled(everything)
    both = await final_of(
        everything, "How do I bake sourdough bread, and who wrote Middlemarch?", greedy(3)
    )
    clauses = both.metadata["nlp_result"]["clauses"]
    assert len(clauses) == 2
    found = {near["prompt"]: near.get("clause") for near in both.metadata["similar"]}
    assert set(found) == {ASKED, "Who wrote Middlemarch?"}
    assert set(found.values()) <= {None, *clauses}


async def test_what_is_late_reaches_the_store_only(
    equip: Equip, analyser: SpacyAnalyser, answer_store: PostgresAnswers
) -> None:
    free = asyncio.Event()

    class Slow:
        pipeline = analyser.pipeline

        async def analyse(self, text: str) -> Any:
            await free.wait()
            return await analyser.analyse(text)

    llm = equip(HandlerConfig(enrichment_wait_s=0.01), analyser=Slow(), store=answer_store)
    scope = RequestScope(deferred=True)
    with scope.active():
        output = await final_of(llm, "Late findings", greedy(3))
    assert output.metadata["late"] == ["nlp"]
    assert output.metadata["nlp_result"] is None
    (entry,) = scope.report.entries
    assert entry.answer is not None
    await answer_store.put(entry.answer)
    free.set()
    await settled(llm)
    kept = await answer_store.by_id("default", entry.answer.id)
    assert kept is not None
    assert kept.analysis is not None
    assert (await final_of(llm, "Late findings", greedy(3))).metadata["nlp_result"] is not None


async def test_an_answer_is_analysed_where_asked(
    everything: Equipped, answer_store: PostgresAnswers
) -> None:
    plain, asked = RequestScope(), RequestScope(analyse_answer=True)
    seen = []
    for scope in (asked, asked, plain):
        with scope.active():
            seen.append((await final_of(everything, ASKED, full(20))).metadata)
    assert seen[0]["answer_nlp_result"]["sentences"]
    assert seen[1]["cached"]
    assert seen[1]["answer_nlp_result"] == seen[0]["answer_nlp_result"]
    # An answer that was stored without is analysed when it is given.
    with plain.active():
        bare = await final_of(everything, MEANT, full(20))
    assert bare.metadata["answer_nlp_result"] is None
    with asked.active():
        given = await final_of(everything, MEANT, full(20))
    assert given.metadata["cached"]
    assert given.metadata["answer_nlp_result"]["sentences"]


async def meant(
    llm: Equipped, prompt: str = MEANT, max_tokens: int = 48, **fields: Any
) -> tuple[Any, RequestScope]:
    """Ask by meaning; return the final output and the scope."""
    scope = RequestScope(reuse=SEMANTIC, **fields)
    with scope.active():
        output = await final_of(llm, prompt, full(max_tokens))
    await settled(llm)
    return output, scope


async def decisions(database: Database) -> Sequence[Any]:
    """Return the rows of the record of decisions."""
    async with database.connection() as connection:
        statement = text(
            "SELECT answer_id, own_answer_id, similarity, served, shadow, rule, agreement "
            "FROM reuse_decisions ORDER BY created_at"
        )
        return (await connection.execute(statement)).all()


async def test_a_neighbours_answer_is_served_by_meaning(
    everything: Equipped, database: Database
) -> None:
    stored = await final_of(everything, ASKED, full(48))
    await settled(everything)
    output, scope = await meant(everything)
    data = output.metadata
    assert (data["provenance"], data["cached"], data["tier"]) == ("semantic", True, "store")
    assert data["source_answer_id"] == stored.metadata["answer_id"]
    assert 0.9 < data["similarity"] < 1
    assert output.text == stored.text
    assert data["nlp_result"]["sentences"] == [MEANT]
    assert output.prompt_token_ids != stored.prompt_token_ids
    await idle(everything)
    (decision,) = scope.report.decisions
    assert decision.served
    assert scope.report.entries[0].stored
    (row,) = await decisions(database)
    assert (row.served, row.shadow, row.rule) == (True, False, None)
    assert str(row.answer_id) == data["source_answer_id"]
    assert everything.stats()["hits"]["semantic/store"] == 1
    stages = {name: took["times"] for name, took in everything.stats()["stages"].items()}
    # Those of an answer that was served by meaning count as all others do.
    assert stages.items() >= {"semantic": 1, "nlp": 2, "total": 2, "generate": 1}.items()
    assert data["processing_time"]["semantic"] > 0
    assert everything.stats()["decisions_lost"] == 0
    used = everything.stats()["processes"]
    assert used["self"]["pid"] == os.getpid()
    assert {"VLLM::EngineCore", "spacy", "minilm"} <= used.keys()
    for process in used.values():
        assert process["memory_bytes"] > 2**20
        assert process["cpu_s"] > 0
    # An answer by meaning is not kept as if it were the answer to these very words.
    exact = await final_of(everything, MEANT, full(48))
    assert exact.metadata["provenance"] == "generated"


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("How do I bake sourdough rolls?", {}),
        ("How do I not bake sourdough bread?", {}),
        (MEANT, {"threshold": 1.0}),
        (MEANT, {"context": b"another system prompt"}),
        (MEANT, {"namespace": "another"}),
    ],
)
async def test_a_neighbour_that_differs_is_not_served(
    everything: Equipped, prompt: str, fields: dict[str, Any]
) -> None:
    await final_of(everything, ASKED, full(24))
    await settled(everything)
    output, scope = await meant(everything, prompt, 24, **fields)
    assert output.metadata["provenance"] == "generated"
    assert all(decision.rule for decision in scope.report.decisions)
    assert all(not decision.served for decision in scope.report.decisions)
    if not fields:
        assert scope.report.decisions


async def test_other_parameters_are_another_scope(everything: Equipped) -> None:
    await final_of(everything, ASKED, full(24))
    await settled(everything)
    output, scope = await meant(everything, MEANT, 25)
    assert output.metadata["provenance"] == "generated"
    assert scope.report.decisions == []


async def test_what_hangs_on_the_very_words_is_not_served_by_meaning(everything: Equipped) -> None:
    """Log probabilities of a prompt are another prompt's; a cut prompt is another question."""
    params = greedy(24, ignore_eos=True, prompt_logprobs=1)
    await final_of(everything, ASKED, params)
    await final_of(everything, ASKED, full(24), tokenization_kwargs={"truncate_prompt_tokens": 3})
    await settled(everything)
    scope = RequestScope(reuse=SEMANTIC)
    with scope.active():
        of_words = await final_of(everything, MEANT, params)
        whole = await final_of(everything, MEANT, full(24))
    await settled(everything)
    assert len(of_words.prompt_logprobs) == len(of_words.prompt_token_ids)
    assert of_words.metadata["provenance"] == whole.metadata["provenance"] == "generated"
    assert "very words" in of_words.metadata["disabled"]["semantic"]
    assert "semantic" not in whole.metadata["disabled"]
    assert scope.report.decisions == []


async def test_who_leaves_by_meaning_hurts_nobody_on_the_flight(everything: Equipped) -> None:
    await final_of(everything, ASKED, full(48))
    await settled(everything)
    params = full(48)
    exact = await everything.add_request("exact", MEANT, params)
    with RequestScope(reuse=SEMANTIC).active():
        joined_in = await everything.add_request("meant", MEANT, params)
    assert everything.stats()["coalesced"] == 1
    served, generated = [
        [output async for output in collector.aiter()][-1] for collector in (joined_in, exact)
    ]
    assert served.metadata["provenance"] == "semantic"
    assert generated.metadata["provenance"] == "generated"
    assert len(generated.outputs[0].token_ids) == 48


async def test_each_is_compared_by_its_own_text(everything: Equipped) -> None:
    """Two of a flight may have been asked different things, in the end by the same tokens."""
    await final_of(everything, ASKED, full(48))
    await settled(everything)
    with RequestScope(text="Who wrote Middlemarch?").active():
        first = await everything.add_request("first", "Some tokens.", full(48))
    scope = RequestScope(reuse=SEMANTIC, text=MEANT)
    with scope.active():
        second = await everything.add_request("second", "Some tokens.", full(48))
    outputs = [[out async for out in one.aiter()][-1] for one in (second, first)]
    assert everything.stats()["coalesced"] == 1
    assert [out.metadata["provenance"] for out in outputs] == ["semantic", "generated"]


async def test_of_a_rendered_chat_the_last_turn_is_compared(everything: Equipped) -> None:
    """A library user's own way to chat: by the model's template, with nothing named in a scope."""
    tokenizer = everything.get_tokenizer()

    def chat(system: str, user: str) -> str:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    stored = await final_of(everything, chat("You are a baker.", ASKED), full(48))
    assert stored.metadata["nlp_result"]["sentences"] == [ASKED]
    await settled(everything)
    same, _ = await meant(everything, chat("You are a baker.", MEANT))
    assert (same.metadata["provenance"], same.text) == ("semantic", stored.text)
    for prompt in (chat("You are a good baker.", MEANT), MEANT):
        other, scope = await meant(everything, prompt)
        assert other.metadata["provenance"] == "generated"
        assert scope.report.decisions == []


class LateReuser:
    """Finds an answer only when it is let."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.answer: StoredAnswer | None = None

    async def find_reusable(self, *args: Any, **kwargs: Any) -> Any:
        await self.free.wait()
        assert self.answer is not None
        found = Considered(answer_id=self.answer.id, prompt=ASKED, similarity=0.99, served=True)
        return self.answer, [found]


async def test_once_something_was_handed_out_the_race_is_lost(
    equip: Equip, analyser: SpacyAnalyser, embedder: MiniLmEmbedder, answer_store: PostgresAnswers
) -> None:
    reuser = LateReuser()
    llm = equip(ALL_ON, analyser=analyser, embedder=embedder, store=answer_store, reuser=reuser)
    keep = RequestScope()
    with keep.active():
        await final_of(llm, ASKED, greedy(8))
    reuser.answer = keep.report.entries[0].answer
    scope = RequestScope(reuse=SEMANTIC)
    params = SamplingParams(
        temperature=0.0, max_tokens=8, output_kind=RequestOutputKind.DELTA, ignore_eos=True
    )
    with scope.active():
        collector = await llm.add_request("slow race", MEANT, params)
    outputs = [await collector.get()]
    reuser.free.set()
    outputs += [output async for output in collector.aiter()]
    assert outputs[-1].metadata["provenance"] == "generated"
    assert len(joined(outputs, RequestOutputKind.DELTA)[0][1]) == 8
    await settled(llm)
    (decision,) = scope.report.decisions
    assert (decision.served, decision.rule) == (False, "too_late")
    # Held up for ever, it holds up nothing, and leaves nothing behind.
    reuser.free.clear()
    with scope.active():
        output = await final_of(llm, MEANT + " Please.", greedy(4))
    assert output.metadata["provenance"] == "generated"
    await settled(llm)


async def test_shadow_mode_decides_and_serves_what_was_generated(
    equip: Equip,
    analyser: SpacyAnalyser,
    embedder: MiniLmEmbedder,
    answer_store: PostgresAnswers,
    database: Database,
) -> None:
    config = ALL_ON.model_copy(update={"similarity": SimilarityConfig(shadow=True)})
    llm = equip(config, analyser=analyser, embedder=embedder, store=answer_store)
    stored = await final_of(llm, ASKED, full(24))
    await settled(llm)
    output, scope = await meant(llm, MEANT, 24)
    assert output.metadata["provenance"] == "generated"
    (decision,) = scope.report.decisions
    assert decision.shadow
    assert decision.served
    assert str(decision.answer_id) == stored.metadata["answer_id"]
    assert str(decision.own_answer_id) == output.metadata["answer_id"]
    assert decision.agreement is not None
    assert 0 < decision.agreement <= 1
    (row,) = await decisions(database)
    assert row.agreement == pytest.approx(decision.agreement)
    assert isinstance(row.own_answer_id, UUID)


@pytest.mark.parametrize("same", [True, False])
async def test_the_served_model_may_have_the_last_word(
    everything: Equipped, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """The real model says one of two words; which one is not for a small model to be trusted in."""
    await final_of(everything, ASKED, full(48))
    await settled(everything)
    races = everything._races
    assert races is not None
    word, asked = races._verify, []

    async def verify(one: str, other: str) -> bool:
        asked.append((one, other, await word(one, other)))
        return same

    monkeypatch.setattr(races, "_verify", verify)
    output, scope = await meant(everything, verify=Verify.ENGINE)
    ((one, other, said),) = asked
    assert (one, other) == (MEANT, ASKED)
    assert said in (True, False)
    (decision,) = scope.report.decisions
    assert decision.served is same
    assert decision.rule == (None if same else "engine")
    assert output.metadata["provenance"] == ("semantic" if same else "generated")
    await meant(everything, "How do you bake sourdough bread?")
    assert len(asked) == 1


async def test_the_models_word_is_one_token_of_two(everything: Equipped) -> None:
    races = everything._races
    assert races is not None
    verifier = races._verify.__self__  # type: ignore[attr-defined]
    seen: list[Any] = []

    async def add(**call: Any) -> Any:
        # VLLM turns the choice into a grammar, in place.
        seen.append((call["prompt"], copy.deepcopy(call["params"])))
        return await AsyncLLM.add_request(everything, **call)

    verifier._add = add
    said = await verifier.same('Say "yes". \n\n', "Two?")
    assert said in (True, False)
    ((prompt, params),) = seen
    assert params.max_tokens == 1
    assert params.structured_outputs.choice == ["yes", "no"]
    text = everything.get_tokenizer().decode(prompt["prompt_token_ids"])
    assert r'"Say \"yes\". \n\n"' in text
    assert everything.stats()["requests"] == 0
    with pytest.raises(VLLMValidationError):
        await verifier.same("too long " * 5000, "Two?")
    leaving = asyncio.create_task(verifier.same("One?", "Two?"))
    await until(lambda: everything.get_num_unfinished_requests() > 0)
    leaving.cancel()
    await idle(everything)


async def test_without_postgres_the_answer_still_comes(
    equip: Equip, analyser: SpacyAnalyser, embedder: MiniLmEmbedder, answer_store: PostgresAnswers
) -> None:
    store = Outage(answer_store)
    llm = equip(ALL_ON, analyser=analyser, embedder=embedder, store=store)
    llm._store_breaker._rest_s = 0.2
    store.down = True
    scope = RequestScope(reuse=SEMANTIC)
    for number in range(4):
        with scope.active():
            output = await final_of(llm, f"Question {number}: what is rain?", greedy(4))
        assert output.text
        assert output.metadata["provenance"] == "generated"
        assert "store" in output.metadata["errors"]
        assert "similarity" in output.metadata["errors"]
        assert output.metadata["nlp_result"] is not None
    await settled(llm)
    assert llm._store_breaker.failed >= 3
    store.down = False
    await until(lambda: not llm._store_breaker.open)
    output = await final_of(llm, "Question 9: what is rain?", greedy(4))
    assert "store" not in output.metadata["errors"]
    await settled(llm)
    llm.forget()
    again = await final_of(llm, "Question 9: what is rain?", greedy(4))
    assert again.metadata["tier"] == "store"


async def test_a_database_that_is_gone(equip: Equip, stack: Any) -> None:
    """A real driver's error, of a database that is not there."""
    url = stack.database_url.replace("/promptmill", "/not_there")
    database = Database(url)
    llm = equip(PLAIN, store=PostgresAnswers(database))
    output = await final_of(llm, "Gone", greedy(3))
    assert output.text
    assert "DatabaseUnavailableError" in output.metadata["errors"]["store"]
    await settled(llm)
    assert (await final_of(llm, "Gone", greedy(3))).metadata["tier"] == "memory"
    await database.aclose()
