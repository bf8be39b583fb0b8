"""The example that people start from, as written; and both ways to make an engine."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.core_client import EngineCoreClient

import workers.engine
from tests.engine.conftest import PLAIN, Equip, until
from workers.bundled import bundled_model
from workers.engine import EnhancedAsyncLLM, HandlerConfig, Parts
from workers.engine.config import Features
from workers.engine.identity import engine_digest
from workers.engine.parts import default_parts
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.nlp import SpacyAnalyser

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]


async def test_the_example_as_written(equip: Equip, analyser: SpacyAnalyser) -> None:
    config = HandlerConfig(enrichment_wait_s=30)
    enhanced_llm = equip(config, analyser=analyser)
    sampling_params = SamplingParams(temperature=0.0, max_tokens=24)
    took = []
    for _ in range(2):
        started = time.perf_counter()
        collector = await enhanced_llm.add_request(
            request_id="test_request", prompt="What is AI?", params=sampling_params
        )
        async for output in collector.aiter():
            print(output.text)
            if output.finished:
                print(output.metadata.get("cached", False), output.metadata.get("nlp_result"))
        took.append(time.perf_counter() - started)
        assert output.request_id == "test_request"
        assert output.text
        assert output.metadata["nlp_result"]["sentences"] == ["What is AI?"]
        assert output.metadata["errors"] == {}
        assert output.metadata["disabled"]["similarity"] == "no embedder"
    print(f"answered again {took[0] / took[1]:.0f} times as fast")
    assert output.metadata["cached"]
    assert output.metadata["provenance"] == "exact"
    assert output.metadata["tier"] == "memory"
    assert output.metadata["processing_time"]["total"] > 0
    assert took[1] < took[0]


def programs(page: str) -> list[str]:
    """Return what a page shows of the engine as a library, as written."""
    text = (ROOT / page).read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [program for program in shown if "EnhancedAsyncLLM(" in program]


async def test_the_programs_of_the_pages_do_what_they_say(
    equip: Equip,
    analyser: SpacyAnalyser,
    embedder: MiniLmEmbedder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    database_url: str,
) -> None:
    """As their reader would run them, but over the engine that is up."""

    def make(*, model: str, handler_config: HandlerConfig, parts: Any = None) -> Any:
        assert model == str(bundled_model())
        own = parts or default_parts(handler_config)
        # Each is made as the page says, and stands aside for one that is up already.
        assert isinstance(own.analyser, SpacyAnalyser)
        running: dict[str, Any] = {"analyser": analyser, "store": own.store}
        if own.embedder is not None:
            running["embedder"] = embedder
        return equip(handler_config.model_copy(update={"enrichment_wait_s": 60}), **running)

    monkeypatch.setattr(workers.engine, "EnhancedAsyncLLM", make, raising=False)
    started: list[type] = []

    async def start(self: Any) -> None:
        started.append(type(self))

    for part in (SpacyAnalyser, MiniLmEmbedder):
        monkeypatch.setattr(part, "start", start)
    said = []
    for program, given in (
        *((program, ()) for program in programs("README.md")),
        *zip(programs("docs/engine.md"), ((), (database_url,)), strict=True),
    ):
        shown: dict[str, Any] = {"__name__": "page"}
        exec(compile(program, "page", "exec"), shown)  # noqa: S102  our own pages
        await shown["main"](*given)
        said.append(capsys.readouterr().out)
    readme, alone, with_postgres = said
    assert "What is AI?" in readme
    assert " False\n" in readme
    assert " True\n" in readme
    first, again = re.findall(r"^(?:generated|exact) (.+)$", alone, re.MULTILINE)
    assert alone.startswith("generated ")
    assert "\nexact " in alone
    assert first == again
    assert with_postgres.startswith("generated [] ")
    assert started == [SpacyAnalyser, MiniLmEmbedder]


async def test_generate_enhanced_still_works(plain: EnhancedAsyncLLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    for request_id, cached in (("mine", False), (None, True)):
        outputs = [
            out async for out in plain.generate_enhanced("An old caller", params, request_id)
        ]
        assert outputs[-1].finished
        assert outputs[-1].metadata["cached"] == cached


class NoCore:
    """Stands where vLLM's engine core would be; construction alone is looked at."""

    engine_ranks_managed = (0,)

    def shutdown(self, timeout: float | None = None) -> None:
        """There is nothing to end."""


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(**kwargs: Any) -> NoCore:
        return NoCore()

    monkeypatch.setattr(EngineCoreClient, "make_async_mp_client", make)


@pytest.mark.usefixtures("no_core")
def test_every_way_of_construction_makes_the_same(llm: EnhancedAsyncLLM) -> None:
    arguments: dict[str, Any] = {
        "model": str(bundled_model()),
        "served_model_name": "smollm2-135m-instruct",
        "max_model_len": 2048,
        "enforce_eager": True,
        "dtype": "float32",
        "disable_log_stats": True,
    }
    engine_args = AsyncEngineArgs(**arguments)
    parts = Parts()
    made = [
        EnhancedAsyncLLM(**arguments, handler_config=PLAIN, parts=parts),
        EnhancedAsyncLLM.from_engine_args(engine_args, handler_config=PLAIN, parts=parts),
        EnhancedAsyncLLM.from_vllm_config(
            engine_args.create_engine_config(),
            disable_log_stats=True,
            handler_config=PLAIN,
            parts=parts,
        ),
    ]
    for one in made:
        assert type(one) is EnhancedAsyncLLM
        assert one.handler_config is PLAIN
        assert one.parts.analyser is None
        assert not one.log_stats
        assert one.identity == llm.identity
        one.shutdown()
        one.shutdown()


@pytest.mark.usefixtures("no_core")
async def test_with_no_arguments_of_ours_spacy_is_on(llm: EnhancedAsyncLLM) -> None:
    made = EnhancedAsyncLLM.from_vllm_config(llm.vllm_config, disable_log_stats=True)
    assert made.handler_config == HandlerConfig()
    assert isinstance(made.parts.analyser, SpacyAnalyser)
    assert made.enrichers.disabled == {
        "similarity": "no embedder",
        "stored_answers": "no answer store",
    }
    await made.aclose()


def test_what_decides_the_answers_decides_the_identity(llm: EnhancedAsyncLLM) -> None:
    folder = str(bundled_model())
    digests = {llm.identity}
    for changed in (
        {"max_model_len": 1024},
        {"dtype": "bfloat16"},
        {"seed": 7},
        {"logprobs_mode": "processed_logprobs"},
    ):
        args = {"model": folder, "max_model_len": 2048, "dtype": "float32", **changed}
        config = AsyncEngineArgs(enforce_eager=True, **args).create_engine_config()
        digests.add(engine_digest(config))
    assert len(digests) == 5


async def test_closing_leaves_neither_task_nor_process(equip: Equip) -> None:
    import asyncio

    import psutil

    before = asyncio.all_tasks()
    children = set(psutil.Process().children(recursive=True))
    analyser = SpacyAnalyser(HandlerConfig().nlp)
    enhanced = equip(HandlerConfig(features=Features(similarity=False)))
    enhanced.enrichers.analyser = analyser  # not shared, so closed with the engine
    params = SamplingParams(temperature=0.0, max_tokens=200)
    collector = await enhanced.add_request("left", "A long answer is left half-way", params)
    await collector.get()
    assert analyser.pid is None or psutil.pid_exists(analyser.pid)
    await enhanced.aclose()
    await enhanced.aclose()
    await until(lambda: not {task for task in asyncio.all_tasks() - before if not task.done()})
    await until(lambda: set(psutil.Process().children(recursive=True)) <= children)
    await until(lambda: enhanced.get_num_unfinished_requests() == 0)
