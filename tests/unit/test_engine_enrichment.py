"""Stages run side by side, share what they find, and fail alone."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock
from uuid import uuid4

import numpy as np
import pytest

from tests.unit.engine_parts import LengthEmbedder, MemoryStore, WordAnalyser
from workers.engine.config import Features, HandlerConfig, NlpConfig, RetryConfig
from workers.engine.enrichment import Enrichers, EnrichmentRun
from workers.engine.parts import Parts, complete
from workers.engine.protocols import Analyser, AnswerStore, Embedder, Neighbour
from workers.engine.side_tasks import SideTasks

CONFIG = HandlerConfig(retry=RetryConfig(attempts=2, wait_s=0.001))


class Rig:
    """Enrichers over in-memory parts."""

    def __init__(self, config: HandlerConfig = CONFIG, **without: Any) -> None:
        self.analyser, self.embedder, self.store = WordAnalyser(), LengthEmbedder(), MemoryStore()
        self.tasks = SideTasks()
        parts = {"analyser": self.analyser, "embedder": self.embedder, "store": self.store}
        self.enrichers = Enrichers(config, **{**parts, **without})

    async def run(self, text: str | None = "one") -> EnrichmentRun:
        """Run to the end."""
        run = EnrichmentRun(self.enrichers, text, namespace="n", tasks=self.tasks)
        await run.wait()
        return run


def test_the_in_memory_parts_are_what_the_engine_asks_for() -> None:
    assert isinstance(WordAnalyser(), Analyser)
    assert isinstance(LengthEmbedder(), Embedder)
    assert isinstance(MemoryStore(), AnswerStore)


def near(prompt: str, similarity: float) -> Neighbour:
    return Neighbour(answer_id=uuid4(), prompt=prompt, similarity=similarity)


async def test_everything_is_found() -> None:
    rig = Rig()
    rig.store.near = [near("far", 0.5), near("close", 0.9)]
    run = await rig.run()
    assert run.done
    findings = run.findings
    assert findings.analysis is not None
    assert findings.similar is not None
    assert [one.prompt for one in findings.similar] == ["close", "far"]
    assert [(part.part, part.embedder) for part in findings.vectors] == [(0, "length")]
    assert set(findings.seconds) == {"nlp", "similarity"}
    assert findings.errors == {}
    assert findings.running == set()


async def test_each_clause_is_embedded_once_and_looked_up() -> None:
    rig = Rig()
    rig.store.near = [near("close", 0.9)]
    findings = (await rig.run("first\nsecond")).findings
    assert rig.embedder.texts == ["first\nsecond", "first", "second"]
    assert [part.clause for part in findings.vectors] == [None, "first", "second"]
    assert findings.similar is not None
    assert [one.clause for one in findings.similar] == [None]  # each prompt once


async def test_one_that_fails_takes_no_other_along() -> None:
    rig = Rig()
    rig.analyser.failure = RuntimeError("no words")
    findings = (await rig.run()).findings
    assert findings.errors == {"nlp": "RuntimeError: no words"}
    assert findings.analysis is None
    assert findings.vectors
    assert rig.analyser.calls == 2  # tried again
    rig = Rig()
    rig.embedder.failure = RuntimeError("no vectors")
    findings = (await rig.run()).findings
    assert findings.errors == {"similarity": "RuntimeError: no vectors"}
    assert findings.analysis is not None


async def test_without_the_store_there_are_vectors_all_the_same() -> None:
    rig = Rig()
    rig.store.failure = ConnectionError("down")
    run = await rig.run()
    assert run.findings.errors == {"similarity": "ConnectionError: down"}
    assert run.findings.vectors
    assert (await run.prompt())[1] is not None


async def test_who_waits_for_the_prompt_is_told_what_failed() -> None:
    rig = Rig()
    rig.analyser.failure = rig.embedder.failure = RuntimeError("no")
    assert await (await rig.run()).prompt() == (None, None)
    rig = Rig()
    rig.analyser.free.clear()
    run = EnrichmentRun(rig.enrichers, "one", namespace="n", tasks=rig.tasks)
    await run.wait(0.01)
    assert not run.done
    assert run.findings.running >= {"nlp"}
    await rig.tasks.aclose()
    await run.wait()
    assert (await run.prompt())[0] is None
    assert run.findings.running == set()


async def test_what_a_part_cannot_take_at_once_waits_and_is_no_failure() -> None:
    rig = Rig(CONFIG.model_copy(update={"nlp": NlpConfig(concurrency=2, budget_s=60)}))
    rig.analyser.free.clear()
    runs = [
        EnrichmentRun(rig.enrichers, f"text {number}", namespace="n", tasks=rig.tasks)
        for number in range(5)
    ]
    await asyncio.sleep(0.01)
    assert rig.analyser.calls == 2
    rig.analyser.free.set()
    for run in runs:
        await run.wait()
        assert run.findings.analysis is not None
    short = NlpConfig(concurrency=2, budget_s=0.05)
    rig.enrichers.config = CONFIG.model_copy(update={"nlp": short})
    gate = rig.enrichers._gates["nlp"]
    for _ in range(2):
        await gate.acquire()
    assert "busy" in (await rig.run()).findings.errors["nlp"]
    assert rig.enrichers.breakers["nlp"].failed == 0
    assert rig.enrichers.breakers["nlp"].skipped == 1


async def test_once_nobody_wants_it_nothing_more_is_begun() -> None:
    rig = Rig()
    rig.store.near = [near("close", 0.9)]
    run = EnrichmentRun(rig.enrichers, "first\nsecond", namespace="n", tasks=rig.tasks)
    run.leave()
    await run.wait()
    assert run.findings.similar is None
    assert rig.embedder.texts == ["first\nsecond"]
    assert run.findings.errors == {}


async def test_the_answer_is_a_stage_of_its_own() -> None:
    rig = Rig()
    run = await rig.run(None)
    assert run.done
    run.analyse_answer("an answer")
    assert not run.done
    await run.wait()
    assert run.findings.answer_analysis is not None
    assert run.findings.analysis is None
    run.analyse_answer("")
    assert run.done


async def test_what_is_off_or_missing_is_named() -> None:
    off = HandlerConfig(features=Features(nlp=False, similarity=False))
    assert Rig(off).enrichers.disabled == {"nlp": "switched off", "similarity": "switched off"}
    assert not Rig(off).enrichers.active
    assert Rig(analyser=None).enrichers.disabled == {"nlp": "no analyser"}
    assert Rig(embedder=None, store=None).enrichers.disabled == {
        "similarity": "no embedder",
        "stored_answers": "no answer store",
    }
    assert Rig(missing={"plugin:x": "broken"}).enrichers.disabled == {"plugin:x": "broken"}


def test_reuse_by_meaning_needs_all_three_parts() -> None:
    rig = Rig()
    parts = Parts(analyser=rig.analyser, embedder=rig.embedder, store=rig.store)
    assert complete(parts, CONFIG).reuser is not None
    assert complete(Parts(store=rig.store), CONFIG).reuser is None
    off = HandlerConfig(features=Features(similarity=False))
    assert complete(parts, off).reuser is None
    assert complete(parts, CONFIG).plugins == ()


def test_installed_plug_ins_are_taken_and_broken_ones_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from workers.enrich import plugins

    broken = plugins.BrokenPlugin(name="bad", origin="o", reason="ImportError: no")
    found = plugins.Plugins(enrichers=(), broken=(broken,))
    monkeypatch.setattr(plugins, "load_plugins", lambda: found)
    parts = complete(Parts(), HandlerConfig(features=Features(plugins=True)))
    assert parts.plugins == ()
    assert parts.missing == {"plugin:bad": "ImportError: no"}


class Odd:
    """A plug-in of somebody who did not read the protocol to its end."""

    name = "odd"

    def __init__(self, found: Any) -> None:
        self.found = found

    async def enrich(self, text: str, *, namespace: str) -> Any:
        return self.found

    async def aclose(self) -> None:
        msg = "cannot end"
        raise RuntimeError(msg)


@pytest.mark.parametrize("found", [{"x": object()}, {"x": np.float32(1)}, None, ["x"]])
async def test_what_a_plug_in_finds_costs_no_answer_its_place(found: Any) -> None:
    """It would be stored in one transaction with the job's outcome."""
    rig = Rig(plugins=(Odd(found),))
    findings = (await rig.run()).findings
    assert findings.enrichments == {}
    assert findings.errors.keys() == {"plugin:odd"}
    assert rig.enrichers.breakers["plugin:odd"].failed == 2  # tried again
    assert findings.analysis is not None


async def test_what_json_can_hold_is_kept_as_json_holds_it() -> None:
    told: list[str] = []
    found = {"set": {1}, "pair": ("a", None)}
    rig = Rig(plugins=(Odd(found),), took=told.extend)
    findings = (await rig.run()).findings
    assert findings.enrichments == {"odd": {"set": [1], "pair": ["a", None]}}
    assert sorted(told) == ["nlp", "plugin:odd", "similarity"]


async def test_closing_closes_the_parts_whichever_fails_at_it() -> None:
    odd = Odd({})
    rig = Rig(embedder=odd, plugins=(odd,))
    await rig.enrichers.aclose()
    assert rig.analyser.closed == 1
    last = Rig(analyser=odd)
    last.embedder.aclose = AsyncMock()  # type: ignore[method-assign]
    await last.enrichers.aclose()
    last.embedder.aclose.assert_awaited_once()
