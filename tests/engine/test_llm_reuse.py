"""Which answers are given again, to whom, and for how long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from schema.jobs import Reuse
from tests.engine.conftest import (
    PLAIN,
    Equip,
    Equipped,
    final_of,
    greedy,
    read_to_the_end,
    until,
)
from workers.engine import HandlerConfig, RequestScope
from workers.engine.config import CacheConfig, Features, ReusePolicy
from workers.store.answers import PostgresAnswers

pytestmark = pytest.mark.engine

OFF = Features(nlp=False, similarity=False)


async def cached(llm: Equipped, scope: RequestScope, params: SamplingParams | None = None) -> bool:
    """Ask one question under a scope; return whether a stored answer was given."""
    with scope.active():
        output = await final_of(llm, "Who may see this?", params or greedy(3))
    return bool(output.metadata["cached"])


async def test_namespaces_never_share(plain: Equipped) -> None:
    assert not await cached(plain, RequestScope(namespace="a"))
    assert not await cached(plain, RequestScope(namespace="b"))
    assert await cached(plain, RequestScope(namespace="a"))
    assert await cached(plain, RequestScope(namespace="b"))


async def test_namespaces_do_not_share_a_flight(plain: Equipped) -> None:
    async def ask(namespace: str) -> bool:
        return await cached(plain, RequestScope(namespace=namespace), greedy(12))

    assert await asyncio.gather(*(ask(f"n{i}") for i in range(3))) == [False] * 3
    assert plain.stats()["generated"] == 3
    assert plain.stats()["coalesced"] == 0


async def test_reuse_off_neither_reads_nor_stores(plain: Equipped) -> None:
    off = RequestScope(reuse=Reuse.OFF)
    assert not await cached(plain, off)
    assert len(plain.memory) == 0
    assert not await cached(plain, RequestScope())
    assert not await cached(plain, off)
    assert off.report.metadata["not_reusable"] == "the caller asked for no reuse"


async def test_sampled_answers_are_reused_only_when_asked(plain: Equipped) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=4, output_kind=RequestOutputKind.FINAL_ONLY)
    always = RequestScope(reuse=Reuse.ALWAYS)
    assert not await cached(plain, RequestScope(), params)
    assert len(plain.memory) == 0
    assert not await cached(plain, always, params)
    assert await cached(plain, always, params)
    assert not await cached(plain, RequestScope(), params)


async def test_what_may_change_the_answer_is_another_request(plain: Equipped) -> None:
    scope = RequestScope()
    assert not await cached(plain, scope)
    assert not await cached(plain, scope, greedy(4))
    assert not await cached(plain, scope, greedy(3, logprobs=1))
    assert not await cached(plain, scope, greedy(3, stop=["zzz"]))
    assert await cached(plain, scope, greedy(3, output_kind=RequestOutputKind.DELTA))


async def test_a_changed_object_is_another_request(plain: Equipped) -> None:
    params = greedy(3)
    assert not await cached(plain, RequestScope(), params)
    params.max_tokens = 2
    assert not await cached(plain, RequestScope(), params)


async def test_other_weights_are_another_engine(
    plain: Equipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are changed while the engine runs, as vLLM's calls for training do it."""
    called: list[str] = []

    async def rpc(self: AsyncLLM, method: str, *args: Any, **kwargs: Any) -> None:
        called.append(method)

    monkeypatch.setattr(AsyncLLM, "collective_rpc", rpc)
    scope = RequestScope()
    assert not await cached(plain, scope)
    collector = await plain.add_request("r", "Half of either", greedy(40, ignore_eos=True))
    await plain.collective_rpc("profile")
    assert await cached(plain, scope)
    await plain.finish_weight_update()
    output = await read_to_the_end(collector)
    assert "weights changed" in output.metadata["not_reusable"]
    assert len(plain.memory) == 0
    assert not await cached(plain, scope)
    assert await cached(plain, scope)
    assert called == ["profile", "finish_weight_update"]


async def test_an_answer_ends_with_its_time(equip: Equip) -> None:
    llm = equip()
    brief, configured = (
        RequestScope(ttl_s=0.2),
        HandlerConfig(features=OFF, cache=CacheConfig(ttl_s=0.2)),
    )
    for one, scope in ((llm, brief), (equip(configured), RequestScope())):
        assert not await cached(one, scope)
        (answer,) = one.memory._answers.values()
        assert answer.expires_at is not None
        assert answer.expires_at - answer.created_at == pytest.approx(0.2)
        await until(lambda a=answer, m=one.memory: m.get(a.namespace, a.fingerprint) is None)  # type: ignore[misc]  # mypy infers no defaults of a lambda
        assert not await cached(one, scope)


async def test_a_hit_prolongs_an_answers_life_only_where_asked(
    equip: Equip, answer_store: PostgresAnswers
) -> None:
    llm = equip(PLAIN, store=answer_store)

    async def ends(scope: RequestScope) -> tuple[float, float]:
        """Ask; return when the answer ends in memory and in Postgres."""
        await cached(llm, scope)
        await until(lambda: llm.stats()["side_tasks"] == 0)
        answer = scope.report.entries[0].answer
        assert answer is not None
        kept = llm.memory.get(answer.namespace, answer.fingerprint)
        stored = await answer_store.get(answer.namespace, answer.fingerprint)
        assert kept is not None
        assert stored is not None
        return kept.expires_at or 0, stored.expires_at or 0

    first = await ends(RequestScope(ttl_s=500))
    assert await ends(RequestScope(ttl_s=5000)) == pytest.approx(first, abs=1)
    longer = await ends(RequestScope(ttl_s=5000, sliding_ttl=True))
    assert min(longer) > max(first) + 4000
    # Never cut short, and not written at every hit.
    assert await ends(RequestScope(ttl_s=5, sliding_ttl=True)) == longer
    assert await ends(RequestScope(ttl_s=5000, sliding_ttl=True)) == longer
    llm.forget()
    again = await ends(RequestScope(ttl_s=50_000, sliding_ttl=True))
    assert min(again) > max(longer) + 40_000


async def test_a_namespace_reuses_as_it_is_configured(equip: Equip) -> None:
    config = PLAIN.model_copy(
        update={
            "namespaces": {"never": ReusePolicy(reuse=Reuse.OFF), "brief": ReusePolicy(ttl_s=9)}
        }
    )
    llm = equip(config)
    never, brief = RequestScope(namespace="never"), RequestScope(namespace="brief")
    assert not await cached(llm, never)
    assert not await cached(llm, never)
    assert await cached(llm, RequestScope(namespace="never", reuse=Reuse.EXACT)) is False
    assert await cached(llm, RequestScope(namespace="never", reuse=Reuse.EXACT))
    assert not await cached(llm, brief)
    answer = brief.report.entries[0].answer
    assert answer is not None
    assert answer.expires_at is not None
    assert answer.expires_at - answer.created_at == pytest.approx(9)


async def test_forgetting(plain: Equipped) -> None:
    tagged = RequestScope(namespace="a", tags=("doc-1",))
    other = RequestScope(namespace="b")
    for scope in (tagged, other):
        assert not await cached(plain, scope)
    assert plain.forget(namespace="b", tag="doc-1") == 0
    assert plain.forget(tag="doc-1") == 1
    assert not await cached(plain, tagged)
    assert await cached(plain, other)
    answer = other.report.entries[-1].answer
    assert answer is not None
    assert plain.forget(answer_ids=frozenset({answer.id})) == 1
    assert plain.forget(model="another") == 0
    assert plain.forget() == 1
    assert not await cached(plain, tagged)


async def test_exact_reuse_can_be_switched_off(equip: Equip) -> None:
    llm = equip(HandlerConfig(features=Features(exact=False, nlp=False, similarity=False)))
    scope = RequestScope()
    assert not await cached(llm, scope)
    assert not await cached(llm, scope)
    assert scope.report.metadata["not_reusable"] == "exact reuse is switched off"


async def test_where_a_scope_is_needed_none_means_no_reuse(equip: Equip) -> None:
    llm = equip(PLAIN.model_copy(update={"require_scope": True}))
    for _ in range(2):
        output = await final_of(llm, "No scope", greedy(3))
        assert not output.metadata["cached"]
        assert output.metadata["not_reusable"] == "no request scope"
    assert not await cached(llm, RequestScope())
    assert await cached(llm, RequestScope())


async def test_the_report_says_how_each_request_was_answered(plain: Equipped) -> None:
    scope = RequestScope(namespace="a")
    with scope.active():
        first = await final_of(plain, "Report", greedy(3), "one")
        await final_of(plain, "Report", greedy(3), "two")
    entries = scope.report.entries
    assert [entry.request_id for entry in entries] == ["one", "two"]
    assert [entry.metadata["provenance"] for entry in entries] == ["generated", "exact"]
    assert entries[0].answer is not None
    assert entries[0].answer.completions[0].text == first.text
    assert entries[1].metadata["source_answer_id"] == str(entries[0].answer.id)
    assert not entries[1].stored
    assert scope.report.metadata is entries[0].metadata
