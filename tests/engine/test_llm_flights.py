"""Identical requests in flight share one generation, and nobody is hurt by what another does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tests.engine.conftest import (
    Equip,
    Equipped,
    final_of,
    greedy,
    idle,
    joined,
    outputs_of,
    read_to_the_end,
    until,
)
from workers.engine import HandlerConfig
from workers.engine.config import Features

pytestmark = pytest.mark.engine

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


def endless(kind: RequestOutputKind = DELTA) -> SamplingParams:
    """Return parameters of a request that goes on until it is aborted."""
    return SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True, output_kind=kind)


@pytest.fixture
def native_requests(monkeypatch: pytest.MonkeyPatch, equip: Equip) -> list[str]:
    """Ids of the requests that reach vLLM."""
    ids: list[str] = []
    add = AsyncLLM.add_request

    async def counted(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        ids.append(request_id)
        return await add(self, request_id, *args, **kwargs)

    monkeypatch.setattr(AsyncLLM, "add_request", counted)
    return ids


async def test_32_at_once_are_one_generation(native_requests: list[str], equip: Equip) -> None:
    llm = equip()
    kinds = list(RequestOutputKind)
    all_outputs = await asyncio.gather(
        *(
            outputs_of(llm, "Why is grass green?", greedy(16, output_kind=kinds[i % 3]), f"r{i}")
            for i in range(32)
        )
    )
    # Those who stream share one flight; those who do not wait for any.
    assert len(native_requests) in (1, 2)
    texts = [joined(outputs, kinds[i % 3]) for i, outputs in enumerate(all_outputs)]
    assert texts[0][0][0]
    assert all(text == texts[0] for text in texts)
    for i, outputs in enumerate(all_outputs):
        assert {output.request_id for output in outputs} == {f"r{i}"}
    made = [outputs[-1].metadata["provenance"] for outputs in all_outputs]
    assert made.count("generated") == len(native_requests)
    assert made.count("coalesced") == 32 - len(native_requests)


@pytest.mark.parametrize("kind", list(RequestOutputKind))
async def test_of_one_kind_all_are_one_generation(
    native_requests: list[str], equip: Equip, kind: RequestOutputKind
) -> None:
    llm = equip()
    params = greedy(6, output_kind=kind)
    await asyncio.gather(*(outputs_of(llm, "One kind", params, f"r{i}") for i in range(32)))
    assert len(native_requests) == 1
    assert llm.stats()["coalesced"] == 31
    assert llm.stats()["flights"] == 0


async def test_several_answers_each_are_shared_too(
    native_requests: list[str], equip: Equip
) -> None:
    llm = equip()
    params = SamplingParams(n=2, temperature=0.8, seed=1, max_tokens=5, output_kind=FINAL_ONLY)
    finals = await asyncio.gather(*(final_of(llm, "Twice", params, f"r{i}") for i in range(4)))
    assert len(native_requests) == 1
    assert len({tuple(piece.text for piece in final.outputs) for final in finals}) == 1


async def test_who_comes_late_gets_the_stream_from_its_start(plain: Equipped) -> None:
    params = greedy(40, output_kind=DELTA, ignore_eos=True)
    first = await plain.add_request("first", "Tell me about ships", params)
    early = [await first.get() for _ in range(3)]
    late = asyncio.create_task(outputs_of(plain, "Tell me about ships", params, "late"))
    while not early[-1].finished:
        early.append(await first.get())
    first.close()
    whole = joined(early, DELTA)
    outputs = await late
    assert outputs[-1].metadata["provenance"] == "coalesced"
    assert joined(outputs, DELTA) == whole
    assert len(whole[0][1]) == 40


async def test_nobody_sees_what_anothers_reading_changes(plain: Equipped) -> None:
    params = greedy(12, output_kind=DELTA, logprobs=1)
    one, other = [
        await plain.add_request(name, "Spoil nothing", params) for name in ("one", "other")
    ]
    async for output in one.aiter():
        for piece in output.outputs:
            piece.text = "spoilt"
            piece.token_ids.clear()
            for candidates in piece.logprobs:
                for candidate in candidates.values():
                    candidate.logprob = 99.0  # as vLLM's handlers cut off minus infinity
                candidates.clear()
            piece.logprobs.clear()
        output.prompt_token_ids.clear()
    outputs = [output async for output in other.aiter()]
    whole = joined(outputs, DELTA)
    assert "spoilt" not in whole[0][0]
    assert len(whole[0][1]) == 12
    told = [position for output in outputs for position in output.outputs[0].logprobs]
    assert len(told) == 12
    assert all(one.logprob <= 0 for position in told for one in position.values())
    again = await final_of(plain, "Spoil nothing", greedy(12, logprobs=1))
    assert again.outputs[0].logprobs == told
    assert (again.text, again.outputs[0].token_ids) == whole[0]
    again.outputs[0].token_ids.clear()
    again.prompt_token_ids.clear()
    third = await final_of(plain, "Spoil nothing", greedy(12, logprobs=1))
    assert third.outputs[0].token_ids == whole[0][1]
    assert third.prompt_token_ids


async def test_a_cancelled_leader_hurts_nobody(native_requests: list[str], equip: Equip) -> None:
    llm = equip()
    params = greedy(30, output_kind=DELTA, ignore_eos=True)

    async def read(request_id: str) -> list[Any]:
        return [out async for out in llm.generate("Follow the leader", params, request_id)]

    leader = asyncio.create_task(read("leader"))
    await until(lambda: len(native_requests) == 1)
    followers = [asyncio.create_task(read(f"follower-{i}")) for i in range(3)]
    await until(lambda: llm.stats()["coalesced"] == 3)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    for outputs in await asyncio.gather(*followers):
        assert len(joined(outputs, DELTA)[0][1]) == 30
    assert len(native_requests) == 1


async def test_the_last_to_leave_ends_the_generation(plain: Equipped) -> None:
    collectors = [
        await plain.add_request(f"r{i}", "Endless", endless(), priority=0) for i in range(3)
    ]
    for collector in collectors:
        await collector.get()
    assert plain.get_num_unfinished_requests() == 1
    await plain.abort(["r0", "r1"])
    assert plain.get_num_unfinished_requests() == 1
    output = await read_to_the_end(collectors[0])
    assert output.outputs[0].finish_reason == "abort"
    assert (await collectors[2].get()).outputs
    await plain.abort("r2")
    await idle(plain)
    assert plain.stats()["flights"] == 0
    assert len(plain.memory) == 0


async def test_cancelled_before_vllm_has_it_leaves_nothing(plain: Equipped) -> None:
    tasks = [asyncio.create_task(final_of(plain, "Hasty", endless(), f"r{i}")) for i in range(4)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await idle(plain)
    await until(lambda: plain.stats()["flights"] == 0)


async def test_an_error_reaches_everybody(plain: Equipped) -> None:
    collectors = [await plain.add_request(f"r{i}", "Doomed", endless()) for i in range(3)]
    await collectors[0].get()
    error = EngineDeadError()
    native = collectors[0].parent_collector
    assert native is not None
    native.put(error)
    for collector in collectors:
        with pytest.raises(EngineDeadError) as caught:
            await read_to_the_end(collector)
        assert caught.value is error
        collector.close()
    await plain.abort(native.request_id, internal=True)
    await idle(plain)
    assert len(plain.memory) == 0


async def test_without_coalescing_each_is_generated(
    native_requests: list[str], equip: Equip
) -> None:
    llm = equip(HandlerConfig(features=Features(nlp=False, similarity=False, coalesce=False)))
    finals = await asyncio.gather(*(final_of(llm, "Alone", greedy(4), f"r{i}") for i in range(3)))
    assert len(native_requests) == 3
    assert {final.metadata["provenance"] for final in finals} == {"generated"}
    assert (await final_of(llm, "Alone", greedy(4))).metadata["cached"]


async def test_what_may_not_be_reused_is_not_shared(
    native_requests: list[str], equip: Equip
) -> None:
    llm = equip()
    params = SamplingParams(temperature=1.0, max_tokens=4)
    await asyncio.gather(*(outputs_of(llm, "Sampled", params, f"r{i}") for i in range(3)))
    assert len(native_requests) == 3


async def test_closing_tells_whoever_still_reads(equip: Equip) -> None:
    llm = equip()
    collector = await llm.add_request("r", "Closed over", endless())
    await collector.get()
    await llm.aclose()
    with pytest.raises(EngineDeadError):
        await read_to_the_end(collector)
    await idle(llm)
