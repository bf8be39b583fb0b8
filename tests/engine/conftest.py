"""The real engine with the real small model: started once a run, equipped anew for each test."""

# ruff: noqa: E402  vLLM and its libraries read the environment when they are imported

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

# Nothing is fetched or reported, and the room for keys and values is small.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

# Each test has a database of its own there; so do these.
from tests.integration.conftest import (  # noqa: F401
    answer_store,
    cluster,
    database,
    database_url,
    migrated_template,
)
from workers.bundled import bundled_model
from workers.engine import EnhancedAsyncLLM, EnhancedRequestOutput, HandlerConfig, Parts
from workers.engine.config import Features
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.nlp import SpacyAnalyser

PLAIN = HandlerConfig(features=Features(nlp=False, similarity=False))


class Equipped(EnhancedAsyncLLM):
    """Another set of our parts over an engine that is running; ending it leaves the engine be."""

    def shutdown(self, timeout: float | None = None) -> None:
        """Cancel side tasks only."""
        if (tasks := vars(self).get("_side_tasks")) is not None:
            tasks.cancel()


Equip = Callable[..., Equipped]


@pytest.fixture(autouse=True)
def patient_with_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine that stands still for a second is no outage."""
    monkeypatch.setattr("workers.engine.durable._LOOK_UP_BUDGET_S", 30.0)


@pytest.fixture(scope="session")
async def llm() -> AsyncIterator[EnhancedAsyncLLM]:
    """The engine, made the short way.

    Compiling would take longer than all that is asked of it; and a processor without instructions
    for bfloat16 computes with it several times slower than with float32.
    """
    llm = EnhancedAsyncLLM(
        model=str(bundled_model()),
        served_model_name="smollm2-135m-instruct",
        max_model_len=2048,
        enforce_eager=True,
        dtype="float32",
        handler_config=PLAIN,
    )
    yield llm
    await llm.aclose()
    await llm.aclose()
    # vLLM kills what does not end in its time, and does not wait for the kill.
    left = [child for child in psutil.Process().children(recursive=True) if _is_vllms(child)]
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive


def _is_vllms(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE and process.name().startswith("VLLM")
    return False


@pytest.fixture(scope="session")
async def analyser() -> AsyncIterator[SpacyAnalyser]:
    """SpaCy, in a process of its own."""
    analyser = SpacyAnalyser(HandlerConfig().nlp)
    await analyser.start()
    yield analyser
    await analyser.aclose()


@pytest.fixture(scope="session")
async def embedder() -> AsyncIterator[MiniLmEmbedder]:
    """MiniLM, in a process of its own."""
    embedder = MiniLmEmbedder(HandlerConfig().similarity)
    await embedder.start()
    yield embedder
    await embedder.aclose()


class Kept:
    """A part that several engines share: none of them closes it."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    async def aclose(self) -> None:
        """Leave it open."""


@pytest.fixture
async def equip(llm: EnhancedAsyncLLM) -> AsyncIterator[Equip]:
    """Make our parts anew over the one engine: ``equip(config, analyser=…, store=…)``."""
    made: list[Equipped] = []

    def equip(config: HandlerConfig = PLAIN, **parts: Any) -> Equipped:
        equipped = Equipped.__new__(Equipped)
        equipped.__dict__.update(vars(llm))
        shared: dict[str, Any] = {
            name: Kept(part) if name in ("analyser", "embedder") else part
            for name, part in parts.items()
        }
        equipped._equip(config, Parts(**shared))
        made.append(equipped)
        return equipped

    yield equip
    for equipped in made:
        await equipped.aclose()
    await idle(llm)


@pytest.fixture
def plain(equip: Equip) -> Equipped:
    """An engine with the memory tier and coalescing, and no enrichment."""
    return equip()


def greedy(max_tokens: int = 8, **fields: Any) -> SamplingParams:
    """Return parameters of a short greedy request that gives its final output only."""
    fields.setdefault("output_kind", RequestOutputKind.FINAL_ONLY)
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


async def outputs_of(
    llm: EnhancedAsyncLLM, prompt: Any, params: Any, request_id: str = "r", **kwargs: Any
) -> list[EnhancedRequestOutput]:
    """Return all outputs of one request."""
    collector = await llm.add_request(request_id, prompt, params, **kwargs)
    return [output async for output in collector.aiter()]


async def final_of(
    llm: EnhancedAsyncLLM, prompt: Any, params: Any, request_id: str = "r", **kwargs: Any
) -> EnhancedRequestOutput:
    """Return the last output of one request."""
    return (await outputs_of(llm, prompt, params, request_id, **kwargs))[-1]


def joined(outputs: list[EnhancedRequestOutput], kind: RequestOutputKind) -> dict[int, Any]:
    """Return text and token ids of each completion, whatever way they were cut."""
    whole: dict[int, Any] = {}
    for output in outputs:
        for piece in output.outputs:
            text, ids = whole.get(piece.index, ("", []))
            if kind == RequestOutputKind.DELTA:
                whole[piece.index] = (text + piece.text, [*ids, *piece.token_ids])
            else:
                whole[piece.index] = (piece.text, list(piece.token_ids))
    return whole


async def read_to_the_end(collector: Any) -> EnhancedRequestOutput:
    """Read a collector up to its final output, or to what ends it."""
    while not (output := await collector.get()).finished:
        pass
    return output


async def until(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def idle(llm: EnhancedAsyncLLM) -> None:
    """Wait until vLLM works on nothing any more."""
    await until(lambda: llm.get_num_unfinished_requests() == 0)
