"""The real spaCy and embedder processes, neighbours over real pgvector, and installed plug-ins."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import psutil
import pytest

from workers.engine.config import NlpConfig, SimilarityConfig
from workers.engine.protocols import (
    Analyser,
    Analysis,
    Embedder,
    Enricher,
    PartVector,
    StoredAnswer,
    StoredCompletion,
)
from workers.enrich import child
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.errors import (
    EnrichmentBusyError,
    EnrichmentTimeoutError,
    EnrichmentUnavailableError,
)
from workers.enrich.guard import Guard
from workers.enrich.neighbours import NOT_NEAR_ENOUGH, WITHDRAWN, Similarity
from workers.enrich.nlp import SpacyAnalyser
from workers.enrich.plugins import load_plugins
from workers.store.answers import PostgresAnswers

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tests" / "fixtures" / "enricher_package"
SCOPE = hashlib.sha256(b"one engine, no system prompt").digest()


@pytest.fixture(scope="module")
async def analyser() -> AsyncIterator[SpacyAnalyser]:
    """Real spaCy, shared by the tests that do no harm to it."""
    analyser = SpacyAnalyser(NlpConfig(budget_s=120.0))
    yield analyser
    await analyser.aclose()


@pytest.fixture(scope="module")
async def embedder() -> AsyncIterator[MiniLmEmbedder]:
    """The real embedder, shared likewise."""
    embedder = MiniLmEmbedder(SimilarityConfig(budget_s=120.0))
    yield embedder
    await embedder.aclose()


async def until(condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def alive(pid: int | None) -> bool:
    try:
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Analysis


async def test_it_finds_what_an_analysis_holds(analyser: SpacyAnalyser) -> None:
    assert isinstance(analyser, Analyser)
    found = await analyser.analyse(
        "Ada Lovelace wrote a program because she liked numbers. However, it never ran in London."
    )
    assert found.pipeline == analyser.pipeline
    assert found.language == "en"
    assert len(found.sentences) == 2
    assert {entity.text for entity in found.entities} >= {"Ada Lovelace", "London"}
    assert "a program" in found.noun_phrases
    assert found.connectives == ("because", "however")
    assert found.clauses == ()
    assert [token.text for token in found.tokens][:3] == ["Ada", "Lovelace", "wrote"]
    assert found.entities[0].text == found.text[found.entities[0].start : found.entities[0].end]
    assert not found.truncated


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        (
            "What is a comet and how do planets move?",
            ("What is a comet?", "How do planets move?"),
        ),
        (
            "Why do cats purr, and why do dogs bark?",
            ("Why do cats purr?", "Why do dogs bark?"),
        ),
        (
            "What is rust? How is it removed? Thanks.",
            ("What is rust?", "How is it removed?"),
        ),
        ("Who wrote Emma, and when?", ()),
        ("What is the difference between tea and coffee?", ()),
        ("Compare tea and coffee.", ()),
        ("What is rust?", ()),
    ],
)
async def test_a_compound_question_falls_into_questions(
    analyser: SpacyAnalyser, text: str, clauses: tuple[str, ...]
) -> None:
    assert (await analyser.analyse(text)).clauses == clauses


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("How tall is it?", "en"),
        ("AI", "en"),
        ("Was ist der Unterschied zwischen einem Hund und einer Katze?", "de"),
        ("Quelle est la différence entre un chien et un chat dans la maison ?", "fr"),
        ("¿Cuál es la diferencia entre un perro y un gato en la casa?", "es"),
        ("\u0427\u0442\u043e \u044d\u0442\u043e?", "ru"),
        ("これは何ですか", "ja"),
        ("这是什么", "zh"),
        ("", "en"),
    ],
)
async def test_languages_are_told_apart(analyser: SpacyAnalyser, text: str, language: str) -> None:
    assert (await analyser.analyse(text)).language == language


@pytest.mark.parametrize("text", ["", " \n\t ", "\ud83d", "\x00", "a\u200bb", "🙂" * 50, "x" * 500])
async def test_odd_texts_are_analysed(analyser: SpacyAnalyser, text: str) -> None:
    found = await analyser.analyse(text)
    assert found.text == text
    heads = [token.head for token in found.tokens]
    assert all(0 <= head < len(heads) for head in heads)


async def test_an_analysis_survives_the_store(analyser: SpacyAnalyser) -> None:
    found = await analyser.analyse("Why is snow white, and how does ice form in Norway?")
    assert Analysis.from_json(found.to_json()) == found


async def test_a_long_text_is_cut() -> None:
    analyser = SpacyAnalyser(NlpConfig(max_chars=50, budget_s=120.0))
    try:
        found = await analyser.analyse("word " * 100)
        assert found.truncated
        assert len(found.tokens) == 10
    finally:
        await analyser.aclose()


async def test_many_at_once_keep_their_own_results(analyser: SpacyAnalyser) -> None:
    texts = [f"Is {number} a lucky number?" for number in range(150)]
    found = await asyncio.gather(*(analyser.analyse(text) for text in texts))
    assert [item.text for item in found] == texts
    assert [item.tokens[1].text for item in found] == [str(number) for number in range(150)]


# Embedding


async def test_vectors_are_unit_and_mean_something(embedder: MiniLmEmbedder) -> None:
    assert isinstance(embedder, Embedder)
    vectors = await embedder.embed(
        ["How do I boil eggs?", "How can I boil an egg?", "Who won the war?", ""]
    )
    assert vectors.shape == (4, embedder.dimensions)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert vectors[0] @ vectors[1] > 0.8 > 0.4 > vectors[0] @ vectors[2]
    assert (await embedder.embed([])).shape == (0, embedder.dimensions)


async def test_a_batch_gives_what_single_calls_give(embedder: MiniLmEmbedder) -> None:
    texts = [f"text number {number} " * (1 + number % 5) for number in range(40)]
    together = await embedder.embed(texts)
    alone = await asyncio.gather(*(embedder.embed([text]) for text in texts[:5]))
    assert np.allclose(together[:5], np.concatenate(alone), atol=1e-3)
    assert (await embedder.embed(["\ud83d broken"])).shape == (1, embedder.dimensions)


async def test_a_model_that_is_not_there_is_named() -> None:
    embedder = MiniLmEmbedder(SimilarityConfig(embedder="/no/such/model", budget_s=120.0))
    try:
        with pytest.raises(EnrichmentUnavailableError, match="/no/such/model"):
            await embedder.embed(["x"])
        started = time.monotonic()
        for _ in range(3):  # not a start each, nor a budget
            with pytest.raises(EnrichmentUnavailableError):
                await embedder.embed(["x"])
        assert time.monotonic() - started < 60
    finally:
        await embedder.aclose()


# Processes


async def test_a_killed_process_is_replaced() -> None:
    analyser = SpacyAnalyser(NlpConfig(budget_s=120.0))
    try:
        await analyser.start()
        first = analyser.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert (await analyser.analyse("Is it back?")).tokens
        assert analyser.pid not in {None, first}
        assert analyser.restarts == 1
    finally:
        await analyser.aclose()


async def test_texts_in_work_survive_the_death_of_the_process() -> None:
    analyser = SpacyAnalyser(NlpConfig(budget_s=120.0))
    try:
        await analyser.start()
        work = [
            asyncio.create_task(analyser.analyse(f"What is {number}? " * 50))
            for number in range(20)
        ]
        await asyncio.sleep(0.05)
        assert analyser.pid is not None
        os.kill(analyser.pid, signal.SIGKILL)
        assert len(await asyncio.gather(*work)) == 20
    finally:
        await analyser.aclose()


async def test_a_hanging_process_costs_the_budget_and_is_replaced() -> None:
    analyser = SpacyAnalyser(NlpConfig(budget_s=120.0))
    try:
        await analyser.start()
        first = analyser.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        analyser._process._budget_s = 1.0  # not before: a start on a busy machine may take longer
        with pytest.raises(EnrichmentTimeoutError, match="1 s"):
            await analyser.analyse("Does it hang?")
        await until(lambda: analyser.restarts == 1)
        assert not alive(first)
        analyser._process._budget_s = 120.0
        await analyser.start()
        assert analyser.pid not in {None, first}
    finally:
        await analyser.aclose()


async def test_too_many_waiting_are_refused_at_once() -> None:
    analyser = SpacyAnalyser(NlpConfig(concurrency=4, budget_s=120.0))
    try:
        work = [asyncio.create_task(analyser.analyse(str(number))) for number in range(6)]
        done = await asyncio.gather(*work, return_exceptions=True)
        assert sum(isinstance(item, EnrichmentBusyError) for item in done) == 2
        assert (await analyser.analyse("There is room again.")).tokens
    finally:
        await analyser.aclose()


async def test_a_cancelled_caller_leaves_no_trace(analyser: SpacyAnalyser) -> None:
    work = [asyncio.create_task(analyser.analyse(f"Gone {n}? " * 40)) for n in range(30)]
    await asyncio.sleep(0)
    for task in work:
        task.cancel()
    done = await asyncio.gather(*work, return_exceptions=True)
    assert all(isinstance(item, asyncio.CancelledError) for item in done)
    assert (await analyser.analyse("Still here?")).tokens


async def test_closing_ends_the_process_and_refuses_more() -> None:
    analyser = SpacyAnalyser(NlpConfig(budget_s=120.0))
    await analyser.start()
    pid = analyser.pid
    assert pid is not None
    assert alive(pid)
    os.kill(pid, signal.SIGSTOP)  # so that it cannot have answered before
    waiting = asyncio.create_task(analyser.analyse("Is it read?"))
    await asyncio.sleep(0.05)
    await analyser.aclose()
    await analyser.aclose()
    assert not alive(pid)
    # At once, not when the budget is over.
    with pytest.raises(EnrichmentUnavailableError, match="closed"):
        await asyncio.wait_for(waiting, 60)
    with pytest.raises(EnrichmentUnavailableError, match="closed"):
        await analyser.analyse("x")
    unused = SpacyAnalyser(NlpConfig())
    await unused.aclose()
    assert unused.pid is None


async def test_no_child_outlives_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import asyncio, os, signal
            from workers.engine.config import NlpConfig
            from workers.enrich.nlp import SpacyAnalyser

            async def main():
                analyser = SpacyAnalyser(NlpConfig())
                await analyser.start()
                print(analyser.pid, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

            asyncio.run(main())
            """
        )
    )
    parent = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(script)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    await until(lambda: not alive(int(parent.stdout)))


async def test_ctrl_c_reaches_the_parent_alone(analyser: SpacyAnalyser) -> None:
    await analyser.start()
    pid = analyser.pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    assert (await analyser.analyse("Unmoved?")).tokens
    assert analyser.pid == pid


async def test_children_have_no_gpu_and_one_thread(
    analyser: SpacyAnalyser, embedder: MiniLmEmbedder
) -> None:
    for part in (analyser, embedder):
        await part.start()
        environment = psutil.Process(part.pid).environ()
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        assert environment["OMP_NUM_THREADS"] == "1"
    assert child.__doc__


async def test_the_loop_goes_on_meanwhile(
    analyser: SpacyAnalyser, embedder: MiniLmEmbedder, record_property: Callable[..., None]
) -> None:
    await asyncio.gather(analyser.start(), embedder.start())
    pauses: list[float] = []
    computed: list[float] = []

    async def tick() -> None:
        while True:
            before, cpu_before = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.001)
            pauses.append(time.perf_counter() - before)
            computed.append(time.thread_time() - cpu_before)

    # A full collection of this test run's heap would be counted, and is not ours.
    gc.collect()
    gc.freeze()
    ticking = asyncio.create_task(tick())
    texts = [f"What would happen to the moon of planet {n}? " * (1 + n % 40) for n in range(120)]
    await asyncio.gather(
        *(analyser.analyse(text) for text in texts), *(embedder.embed([text]) for text in texts)
    )
    ticking.cancel()
    gc.unfreeze()
    record_property("longest_pause_ms", round(1000 * max(pauses), 1))
    record_property("longest_computation_ms", round(1000 * max(computed), 1))
    # Of the loop's own thread, so that other processes on the machine do not count.
    assert max(computed) < 0.1


# Neighbours


class Shelf:
    """Stored prompts, with the parts that look among them."""

    def __init__(
        self, store: PostgresAnswers, analyser: SpacyAnalyser, embedder: MiniLmEmbedder
    ) -> None:
        self.store, self.analyser, self.embedder = store, analyser, embedder
        self.similarity = Similarity(
            embedder=embedder,
            analyser=analyser,
            store=store,
            guard=Guard(),
            config=SimilarityConfig(),
        )

    async def put(self, prompt: str, *, namespace: str = "default", analysed: bool = True) -> UUID:
        vectors = await self.embedder.embed([prompt])
        answer_id = uuid4()
        await self.store.put(
            StoredAnswer(
                id=answer_id,
                namespace=namespace,
                fingerprint=hashlib.sha256(answer_id.bytes).digest(),
                engine=SCOPE,
                model="test",
                scope=SCOPE,
                prompt=prompt,
                completions=(
                    StoredCompletion(index=0, text="yes", token_ids=(1,), finish_reason="stop"),
                ),
                analysis=await self.analyser.analyse(prompt) if analysed else None,
                vectors=(PartVector(part=0, vector=vectors[0], embedder=self.embedder.name),),
            )
        )
        return answer_id


@pytest.fixture
def shelf(
    answer_store: PostgresAnswers, analyser: SpacyAnalyser, embedder: MiniLmEmbedder
) -> Shelf:
    """An empty store."""
    return Shelf(answer_store, analyser, embedder)


async def test_neighbours_of_prompt_and_clauses_come_once_and_ranked(shelf: Shelf) -> None:
    comet = await shelf.put("What is a comet?")
    purr = await shelf.put("Why do cats purr?")
    await shelf.put("What is a comet?", namespace="other")
    text = "What is a comet and why do cats purr?"
    analysis = await shelf.analyser.analyse(text)
    found = await shelf.similarity.neighbours(text, analysis, namespace="default")
    assert {item.answer_id: item.clause for item in found} == {
        comet: "What is a comet?",
        purr: "Why do cats purr?",
    }
    assert [item.similarity for item in found] == sorted(
        (item.similarity for item in found), reverse=True
    )
    assert all(item.similarity > 0.99 for item in found)


async def test_a_guarded_neighbour_is_served(shelf: Shelf) -> None:
    away = await shelf.put("How do I switch the lamp off?")
    wanted = await shelf.put("How can I switch the lamp on?")
    answer, considered = await shelf.similarity.find_reusable(
        "How do I switch the lamp on?", namespace="default", scope=SCOPE
    )
    assert answer is not None
    assert answer.id == wanted
    assert answer.completions[0].text == "yes"
    refused = {item.answer_id: item.rule for item in considered if not item.served}
    assert refused in ({}, {away: "antonyms"})


async def test_nothing_is_served_across_scopes_namespaces_and_thresholds(shelf: Shelf) -> None:
    await shelf.put("How can I switch the lamp on?", analysed=False)
    asked = "How do I switch the lamp on?"
    look = shelf.similarity.find_reusable
    served, considered = await look(asked, namespace="default", scope=SCOPE)
    assert served is not None, considered  # analysed on the spot
    assert await look(asked, namespace="other", scope=SCOPE) == (None, [])
    assert await look(asked, namespace="default", scope=b"another engine") == (None, [])
    assert await look(asked, namespace="default", scope=SCOPE, threshold=1.0) == (None, [])


async def test_an_added_word_asks_for_more_nearness(shelf: Shelf) -> None:
    await shelf.put("How do I bake bread?")
    asked = "How do I bake bread quickly?"
    answer, considered = await shelf.similarity.find_reusable(
        asked, namespace="default", scope=SCOPE
    )
    assert answer is not None
    near = considered[0].similarity
    answer, considered = await shelf.similarity.find_reusable(
        asked, namespace="default", scope=SCOPE, threshold=near - 0.001
    )
    assert answer is None
    assert considered[0].rule == NOT_NEAR_ENOUGH


async def test_an_answer_withdrawn_meanwhile_is_not_served(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shelf.put("How do I bake bread?")

    async def gone(namespace: str, answer_id: UUID) -> None:
        return None

    monkeypatch.setattr(shelf.store, "by_id", gone)
    answer, considered = await shelf.similarity.find_reusable(
        "How can I bake bread?", namespace="default", scope=SCOPE
    )
    assert answer is None
    assert [item.rule for item in considered] == [WITHDRAWN]


async def test_a_failing_part_is_told_as_it_failed(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(texts: object) -> None:
        raise EnrichmentUnavailableError("no embedder today")

    monkeypatch.setattr(shelf.embedder, "embed", broken)
    with pytest.raises(EnrichmentUnavailableError, match="today"):
        await shelf.similarity.find_reusable("x", namespace="default", scope=SCOPE)


# Plug-ins


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages can be installed into, on the path for one test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return site


def install(package: Path, site: Path) -> None:
    """Install a package as a user would, but for the network."""
    source = site.parent / "source"
    shutil.copytree(package, source)  # building leaves files beside the sources
    command = "install --quiet --no-deps --no-index --no-build-isolation --no-compile --target"
    subprocess.run(
        [sys.executable, "-m", "pip", *command.split(), str(site), str(source)],
        timeout=120,
        check=True,
    )


async def test_an_installed_enricher_is_found_and_runs(site: Path) -> None:
    install(PACKAGE, site)
    found = load_plugins()
    enricher = next(item for item in found.enrichers if item.name == "word_count")
    assert isinstance(enricher, Enricher)
    assert await enricher.enrich("three short words", namespace="default") == {"words": 3}
    await enricher.aclose()


async def test_a_broken_enricher_is_named_and_others_go_on(site: Path) -> None:
    install(PACKAGE, site)
    broken = site / "broken-2.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2.0\n")
    (broken / "entry_points.txt").write_text(
        "[promptmill.enrichers]\n"
        "missing = no_such_module:Thing\n"
        "not_one = collections:OrderedDict\n"
        "twice = promptmill_word_count:WordCount\n"
    )
    found = load_plugins()
    assert [item.name for item in found.enrichers] == ["word_count"]
    reasons = {item.name: f"{item.origin} {item.reason}" for item in found.broken}
    assert reasons.keys() == {"missing", "not_one", "twice"} or reasons.keys() == {
        "missing",
        "not_one",
        "word_count",
    }
    assert "no_such_module" in reasons["missing"]
    assert "of broken" in reasons["missing"]
    assert "OrderedDict without name, enrich and aclose" in reasons["not_one"]
