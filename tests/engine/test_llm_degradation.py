"""With a part taken away the answer still comes, as vLLM made it, and says what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.sampling_params import RequestOutputKind

from schema.jobs import Reuse
from tests.engine.conftest import PLAIN, Equip, final_of, greedy, joined, outputs_of, until
from workers import local
from workers.engine import EnhancedAsyncLLM, HandlerConfig, RequestScope
from workers.engine.config import Features, NlpConfig, PluginConfig, RetryConfig, SimilarityConfig
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.errors import EnrichmentError
from workers.enrich.nlp import SpacyAnalyser
from workers.pinning import spare_cores
from workers.store import schema_upgrade
from workers.store.answers import PostgresAnswers
from workers.store.database import Database

pytestmark = pytest.mark.engine

WAITING = HandlerConfig(
    enrichment_wait_s=30,
    features=Features(similarity=False),
    retry=RetryConfig(attempts=1),
)


async def test_spacy_killed_is_started_again(equip: Equip) -> None:
    analyser = SpacyAnalyser(NlpConfig())
    await analyser.start()
    llm = equip(WAITING, analyser=analyser)
    assert (await final_of(llm, "Alive", greedy(3))).metadata["nlp_result"] is not None
    assert analyser.pid is not None
    os.kill(analyser.pid, signal.SIGKILL)
    killed = await final_of(llm, "Killed", greedy(3))
    assert killed.text
    # Either it was noticed in time and started again, or the answer says that it failed.
    assert killed.metadata["nlp_result"] is not None or "nlp" in killed.metadata["errors"]
    for number in range(50):
        output = await final_of(llm, f"Back {number}", greedy(2))
        if output.metadata["nlp_result"] is not None:
            break
        await asyncio.sleep(0.1)
    assert output.metadata["nlp_result"] is not None
    assert analyser.restarts >= 1
    await analyser.aclose()


async def test_enrichment_can_leave_the_engines_cores_alone(llm: EnhancedAsyncLLM) -> None:
    assert not llm.errored
    cores = spare_cores()
    if not cores:
        pytest.skip("the engine leaves fewer cores over than it takes")
    computing = [
        child.cpu_affinity()
        for child in psutil.Process().children(recursive=True)
        if child.name().startswith("VLLM::Worker")
    ]
    assert computing
    assert cores.isdisjoint(core for taken in computing for core in taken or ())
    analyser = SpacyAnalyser(NlpConfig())
    await analyser.start()
    analyser.stay_on(cores)
    first = analyser.pid
    assert first is not None
    assert psutil.Process(first).cpu_affinity() == sorted(cores)
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(60):
        while analyser.pid in (None, first):
            with contextlib.suppress(EnrichmentError):
                await analyser.analyse("Who comes after?")
    assert psutil.Process(analyser.pid).cpu_affinity() == sorted(cores)
    await analyser.aclose()


class Raising:
    """An analyser that fails until it is mended."""

    pipeline = "raising"

    def __init__(self) -> None:
        self.calls = 0

    async def analyse(self, text: str) -> Any:
        self.calls += 1
        msg = "out of order"
        raise RuntimeError(msg)

    async def aclose(self) -> None:
        """Nothing runs."""


async def test_what_keeps_failing_is_left_alone(equip: Equip) -> None:
    analyser = Raising()
    llm = equip(WAITING, analyser=analyser)
    llm.enrichers.breakers["nlp"]._rest_s = 60
    seen = [
        (await final_of(llm, f"Failing {number}", greedy(2))).metadata["errors"]["nlp"]
        for number in range(5)
    ]
    assert seen[:3] == ["RuntimeError: out of order"] * 3
    assert all("left alone" in why for why in seen[3:])
    assert analyser.calls == 3
    stats = llm.stats()
    assert stats["failures"]["nlp"] == 3
    assert stats["left_alone"]["nlp"] == 2


class Hanging:
    """A plug-in that never comes back."""

    name = "hanging"

    async def enrich(self, text: str, *, namespace: str) -> Mapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def aclose(self) -> None:
        """Nothing runs."""


class Counting:
    """A plug-in that works."""

    name = "counting"

    async def enrich(self, text: str, *, namespace: str) -> Mapping[str, Any]:
        return {"words": len(text.split()), "namespace": namespace}

    async def aclose(self) -> None:
        """Nothing runs."""


async def test_a_plug_in_that_hangs_is_cut_and_the_others_work(equip: Equip) -> None:
    config = WAITING.model_copy(
        update={
            "features": Features(nlp=False, similarity=False, plugins=True),
            "plugins": {"hanging": PluginConfig(budget_s=0.2)},
        }
    )
    llm = equip(config, plugins=(Hanging(), Counting()))
    output = await final_of(llm, "Three words here", greedy(3))
    assert output.metadata["enrichments"] == {"counting": {"words": 3, "namespace": "default"}}
    assert "longer than 0.2 s" in output.metadata["errors"]["plugin:hanging"]
    assert llm.stats()["failures"]["plugin:hanging"] == 1
    output.metadata["enrichments"]["counting"]["words"] = 99  # whoever has it may do so
    for _ in range(2):
        again = await final_of(llm, "Three words here", greedy(3))
        assert again.metadata["cached"]
        assert again.metadata["enrichments"]["counting"]["words"] == 3
        again.metadata["enrichments"]["counting"]["words"] = 99


async def test_postgres_goes_and_comes_back(equip: Equip, tmp_path: Path) -> None:
    """The server itself is stopped between two requests, and started again on its data."""
    tmp_path.chmod(0o755)  # noqa: ASYNC240  the server may run as another user
    running = local.start(tmp_path / "data")
    schema_upgrade.upgrade(running.database_url)
    database = Database(running.database_url)
    try:
        llm = equip(PLAIN, store=PostgresAnswers(database))
        llm._store_breaker._rest_s = 0.1
        kept = await final_of(llm, "Kept in Postgres", greedy(3))
        assert kept.metadata["errors"] == {}
        await until(lambda: llm.stats()["side_tasks"] == 0)
        running.close(wait_s=30)
        for number in range(4):
            output = await final_of(llm, f"Gone {number}", greedy(3))
            assert output.text
            assert output.metadata["provenance"] == "generated"
            assert "store" in output.metadata["errors"]
        assert (await final_of(llm, "Kept in Postgres", greedy(3))).metadata["tier"] == "memory"
        await until(lambda: llm.stats()["side_tasks"] == 0)
        assert llm.stats()["failures"]["store"] >= 3
        running = local.start(tmp_path / "data")
        llm.forget()
        async with asyncio.timeout(60):
            while (await final_of(llm, "Kept in Postgres", greedy(3))).metadata["errors"]:
                llm.forget()
                await asyncio.sleep(0.1)
        llm.forget()
        again = await final_of(llm, "Kept in Postgres", greedy(3))
        assert (again.metadata["tier"], again.text) == ("store", kept.text)
    finally:
        await database.aclose()
        running.close(wait_s=30)


async def test_an_embedder_without_its_model_costs_nothing_but_neighbours(
    equip: Equip, answer_store: PostgresAnswers
) -> None:
    """Its process ends with an error each time that it is started."""
    similarity = SimilarityConfig(embedder="no-such-model", budget_s=60)
    embedder = MiniLmEmbedder(similarity)
    config = HandlerConfig(
        features=Features(nlp=False),
        similarity=similarity,
        enrichment_wait_s=60,
        retry=RetryConfig(attempts=1),
    )
    llm = equip(config, embedder=embedder, store=answer_store)
    output = await final_of(llm, "Without vectors", greedy(3))
    assert output.text
    assert "could not be loaded" in output.metadata["errors"]["similarity"]
    assert llm.stats()["failures"]["embedder"] == 1
    assert output.metadata["similar"] == []
    await until(lambda: llm.stats()["side_tasks"] == 0)
    assert (await final_of(llm, "Without vectors", greedy(3))).metadata["cached"]
    await embedder.aclose()


@pytest.mark.parametrize("reuse", [Reuse.EXACT, Reuse.OFF])
@pytest.mark.parametrize("kind", list(RequestOutputKind))
async def test_plug_ins_run_on_the_answer_where_asked(
    equip: Equip, kind: RequestOutputKind, reuse: Reuse
) -> None:
    config = WAITING.model_copy(update={"features": Features(nlp=False, similarity=False)})
    llm = equip(config, plugins=(Counting(),))
    asked = RequestScope(analyse_answer=True, reuse=reuse)
    for _ in range(2):
        with asked.active():
            outputs = await outputs_of(
                llm, "Count to", greedy(6, ignore_eos=True, output_kind=kind)
            )
        data, text = outputs[-1].metadata, joined(outputs, kind)[0][0]
        assert data["answer_enrichments"]["counting"]["words"] == len(text.split()) > 0
        assert data["enrichments"]["counting"]["words"] == 2
        assert data["errors"] == {}
    assert data["cached"] is (reuse == Reuse.EXACT)
    plain = await final_of(llm, "Count up", greedy(6))
    assert plain.metadata["answer_enrichments"] == {}


async def test_the_answer_does_not_wait_for_what_hangs(equip: Equip) -> None:
    config = HandlerConfig(features=Features(nlp=False, similarity=False, plugins=True))
    llm = equip(config, plugins=(Hanging(),))
    async with asyncio.timeout(30):
        output = await final_of(llm, "No waiting", greedy(3))
    assert output.metadata["late"] == ["plugin:hanging"]
    await llm.aclose()
    await until(lambda: llm.stats()["side_tasks"] == 0)
