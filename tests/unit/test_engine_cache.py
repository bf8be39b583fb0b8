"""The memory tier, the breaker, the fingerprint and the scope."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from schema.errors import ServiceError
from tests.unit.engine_parts import MemoryStore, answer
from workers.cache.memory import MemoryCache
from workers.engine.breaker import Breaker, BreakerOpenError
from workers.engine.construction import Signature
from workers.engine.decisions import DecisionLog
from workers.engine.fingerprint import (
    fingerprint,
    ids_digest,
    lora_digest,
    params_digest,
    prompt_parts,
    scope_digest,
)
from workers.engine.protocols import Decision, PartVector
from workers.engine.scope import RequestScope, current_scope
from workers.engine.side_tasks import SideTasks

LARGE = 2**30


def cache(**fields: Any) -> MemoryCache:
    return MemoryCache(**{"entries": 100, "max_bytes": LARGE, "ttl_s": 60.0, **fields})


def test_the_memory_tier_is_bounded_by_entries() -> None:
    memory = cache(entries=3)
    for number in range(5):
        memory.put(answer(bytes([number])))
        memory.get("n", b"\x00")
    assert len(memory) == 3
    assert memory.get("n", b"\x00") is not None  # used, so kept
    assert memory.get("n", b"\x01") is None


def test_the_memory_tier_is_bounded_by_bytes() -> None:
    memory = cache(max_bytes=100_000)
    for number in range(20):
        memory.put(answer(bytes([number]), text="x" * 10_000))
    assert 0 < len(memory) < 10
    assert memory.size_bytes <= 100_000
    memory.put(answer(b"huge", text="x" * 200_000))
    assert memory.get("n", b"huge") is None
    assert cache(entries=0).get("n", b"f") is None


@pytest.mark.parametrize(
    "large",
    [
        {"pooled": [[0.5] * 128] * 64},
        {"prompt_logprobs": (None, *((((1, -0.5, 1, "a"),) * 20),) * 50)},
        {"enrichments": {"translate": {"texts": ["x" * 50_000, ["y" * 50_000]]}}},
        {"vectors": (PartVector(part=0, vector=np.ones(30_000, np.float32), embedder="e"),)},
    ],
)
def test_all_that_an_answer_holds_counts(large: dict[str, Any]) -> None:
    memory = cache(max_bytes=1_000_000)
    memory.put(answer())
    small = memory.size_bytes
    memory.put(answer(b"large", **large))
    assert memory.size_bytes > small + 100_000


def test_an_expired_answer_is_not_given() -> None:
    memory = cache()
    memory.put(answer(expires_at=1.0))
    assert memory.get("n", b"f") is None
    memory.put(answer(expires_at=4e9))
    assert memory.get("n", b"f") is not None
    assert memory.get("another", b"f") is None


def test_an_answer_that_was_forgotten_is_not_completed() -> None:
    memory, first = cache(), answer()
    memory.put(first)
    memory.complete(answer(id=first.id, text="completed"))
    kept = memory.get("n", b"f")
    assert kept is not None
    assert kept.completions[0].text == "completed"
    assert memory.forget(namespace="n") == 1
    memory.complete(first)
    assert memory.get("n", b"f") is None
    memory.put(answer())
    memory.complete(first)  # another answer has taken the place
    kept = memory.get("n", b"f")
    assert kept is not None
    assert kept.id != first.id


async def fail() -> None:
    msg = "down"
    raise ConnectionError(msg)


async def test_a_breaker_opens_rests_and_closes() -> None:
    now = [0.0]
    breaker = Breaker("part", failures=2, rest_s=5.0, clock=lambda: now[0])

    async def work() -> int:
        return 1

    for _ in range(2):
        with pytest.raises(ConnectionError):
            await breaker.call(fail, budget_s=1)
    assert breaker.open
    with pytest.raises(BreakerOpenError, match="left alone"):
        await breaker.call(work, budget_s=1)
    now[0] = 6.0
    with pytest.raises(ConnectionError):
        await breaker.call(fail, budget_s=1)
    assert breaker.open
    now[0] = 12.0
    assert await breaker.call(work, budget_s=1) == 1
    assert not breaker.open
    assert (breaker.failed, breaker.skipped) == (3, 1)
    assert issubclass(BreakerOpenError, ServiceError)


async def test_one_call_at_a_time_tries_whether_it_is_back() -> None:
    now = [0.0]
    breaker = Breaker("part", failures=1, rest_s=5.0, clock=lambda: now[0])
    with pytest.raises(ConnectionError):
        await breaker.call(fail, budget_s=1)
    now[0] = 6.0
    free = asyncio.Event()
    trying = asyncio.create_task(breaker.call(free.wait, budget_s=60))
    await asyncio.sleep(0)
    with pytest.raises(BreakerOpenError):
        await breaker.call(free.wait, budget_s=60)
    free.set()
    assert await trying


async def test_a_thousand_failures_are_one_log_line_a_minute() -> None:
    now = [0.0]
    breaker = Breaker("part", rest_s=0.0, clock=lambda: now[0])
    with structlog.testing.capture_logs() as lines:
        for number in range(1000):
            now[0] = number / 100
            with pytest.raises(ConnectionError):
                await breaker.call(fail, budget_s=1)
        now[0] = 60.0
        with pytest.raises(ConnectionError):
            await breaker.call(fail, budget_s=1)
    assert breaker.failed == 1001
    assert [(line["part"], line["failures"]) for line in lines] == [("part", 1), ("part", 1001)]
    assert "ConnectionError: down" in lines[0]["why"]


async def test_a_breaker_cuts_what_takes_too_long() -> None:
    breaker = Breaker("part", failures=1)
    with pytest.raises(TimeoutError, match=r"part took longer than 0\.01 s"):
        await breaker.call(asyncio.Event().wait, budget_s=0.01)
    assert breaker.open


def key(**fields: Any) -> bytes:
    parts: dict[str, Any] = {
        "namespace": "n",
        "engine": b"e",
        "prompt": {"ids": ids_digest([1, 2])},
        "params": params_digest(SamplingParams()),
        **fields,
    }
    return fingerprint(**parts)


def test_everything_that_counts_is_in_the_fingerprint() -> None:
    params = {"a": 1, "b": [2]}
    keys = [
        key(),
        key(namespace="m"),
        key(engine=b"f"),
        key(prompt={"ids": ids_digest([2, 1])}),
        key(prompt={"ids": ids_digest([1, 2]), "salt": "s"}),
        key(params=params_digest(SamplingParams(top_p=0.5))),
        key(params=params_digest(SamplingParams(logit_bias={3: 1.0}))),
        key(
            params=params_digest(
                SamplingParams(structured_outputs=StructuredOutputsParams(json={}))
            )
        ),
        key(lora="adapter"),
        key(extra={"reasoning_ended": True}),
        key(extra={"reasoning_parser_kwargs": params}),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(one) == 32 for one in keys)
    assert key(extra={"x": {"b": 1, "a": 2}}) == key(extra={"x": {"a": 2, "b": 1}})


def test_a_prompt_is_known_by_ids_media_and_salt_alone() -> None:
    plain = {"type": "token", "prompt_token_ids": [1, 2], "prompt": "p", "arrival_time": 1.0}
    assert prompt_parts(plain) == prompt_parts({**plain, "arrival_time": 2.0, "prompt": "q"})
    assert prompt_parts({**plain, "cache_salt": "s"}) != prompt_parts(plain)
    media = {**plain, "type": "multimodal", "mm_hashes": {"image": ["abc"]}}
    assert prompt_parts(media) != prompt_parts({**media, "mm_hashes": {"image": ["abd"]}})
    assert prompt_parts({"type": "embeds", "prompt_embeds": np.zeros(2)}) is None
    assert prompt_parts({**plain, "encoder_prompt": plain}) is None


def test_an_adapter_is_known_by_its_content(tmp_path: Path) -> None:
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(b"one")
    first = lora_digest(LoRARequest("name", 1, str(tmp_path)))
    assert first == lora_digest(LoRARequest("renamed", 2, str(tmp_path)))
    weights.write_bytes(b"other")
    assert lora_digest(LoRARequest("name", 1, str(tmp_path))) != first
    assert lora_digest(None) is None
    assert lora_digest(LoRARequest("name", 1, "a/repository")) == "name:name:a/repository"


def test_a_scope_of_meaning_holds_engine_context_parameters_and_adapter() -> None:
    base: dict[str, Any] = {"engine": b"e", "context": b"c", "params": b"p", "lora": None}
    digests = {scope_digest(**base)} | {
        scope_digest(**{**base, name: value})
        for name, value in (
            ("engine", b"x"),
            ("context", b"x"),
            ("params", b"x"),
            ("lora", "x"),
            ("besides", {"media": {"image": ["a"]}}),
            ("besides", {"media": {"image": ["b"]}}),
        )
    }
    assert len(digests) == 7
    assert scope_digest(**base, besides={}) == scope_digest(**base)


async def test_a_scope_holds_inside_its_block_and_in_tasks_started_there() -> None:
    async def see() -> RequestScope | None:
        return current_scope()

    scope = RequestScope(namespace="a")
    assert current_scope() is None
    with scope.active():
        task = asyncio.create_task(see())
        with RequestScope(namespace="b").active() as inner:
            assert current_scope() is inner
        assert current_scope() is scope
    assert current_scope() is None
    assert await task is scope
    assert scope.report.metadata == {}


def test_arguments_are_bound_as_python_binds_them() -> None:
    signature = Signature()
    assert signature.bind(("r", "p"), {"params": 1, "priority": 2}) == {
        "request_id": "r",
        "prompt": "p",
        "params": 1,
        "priority": 2,
    }
    for args, kwargs in ((("r",), {}), (("r", "p", 1), {"x": 1}), (("r", "p", 1), {"prompt": 2})):
        with pytest.raises(TypeError):
            signature.bind(args, kwargs)
    with pytest.raises(TypeError, match="too many"):
        signature.bind(tuple(range(40)), {})


async def test_decisions_wait_for_a_store_that_is_down() -> None:
    store, tasks, breaker = MemoryStore(), SideTasks(), Breaker("store", rest_s=0.0)
    log = DecisionLog(store=store, breaker=breaker, budget_s=1.0, tasks=tasks)

    def decision(number: int) -> Decision:
        return Decision(
            namespace="n",
            request_id=str(number),
            answer_id=answer().id,
            similarity=0.9,
            served=False,
            rule="numbers",
        )

    async def written() -> None:
        while len(tasks):
            await asyncio.sleep(0)

    store.failure = ConnectionError("down")
    log.add([decision(0), decision(1)])
    await written()
    assert store.decisions == []
    store.failure = None
    log.add([decision(2)])
    await written()
    assert [one.request_id for one in store.decisions] == ["0", "1", "2"]
    await tasks.aclose()
