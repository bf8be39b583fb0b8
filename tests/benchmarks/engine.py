"""What the enhanced engine costs and saves: ``python -m tests.benchmarks.engine --json``.

One process, one engine. Rounds of vLLM's own `add_request` alternate with rounds of ours on the
same engine, so that a noisy machine slows both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Figure, flattened

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

CONCURRENT = 64
MAX_TOKENS = 16
HITS = 500

QUESTIONS = (
    "How do lighthouses in Norway work, and who looks after them today?",
    "What did sailors eat on long journeys before canned food was invented?",
    "Why does bread dough rise when it is left in a warm place overnight?",
    "Which rivers flow through Budapest, and where does each of them begin?",
    "How can a small library lend tools as well as books to its readers?",
    "What makes the northern lights green, and when are they seen best?",
    "Who invented the bicycle, and how much did the first ones weigh?",
    "Is it cheaper to heat an old house with wood or with a heat pump?",
)

_numbers = itertools.count()


def prompts(count: int) -> list[str]:
    """Return prompts that nobody has asked before.

    Args:
        count: How many.
    """
    return [f"Case {next(_numbers)}. {QUESTIONS[index % len(QUESTIONS)]}" for index in range(count)]


class LoopWatch:
    """Notes for how long the event loop was blocked at a stretch.

    Two measures: by the wall clock, in which other processes of a busy machine count, and by the
    time the loop's own thread worked.
    """

    _EVERY_S = 0.002

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.longest_cpu_s = 0.0
        self._handle: asyncio.TimerHandle | None = None
        self._due = self._cpu = 0.0

    def start(self) -> None:
        """Begin to watch the running loop."""
        self._schedule()

    def stop(self) -> None:
        """End it."""
        if self._handle is not None:
            self._handle.cancel()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        self._due, self._cpu = loop.time() + self._EVERY_S, time.thread_time()
        self._handle = loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        late_s = asyncio.get_running_loop().time() - self._due
        self.longest_s = max(self.longest_s, late_s)
        # What the thread worked since the last tick is at least one stretch, and mostly just one.
        worked_s = min(time.thread_time() - self._cpu, late_s + self._EVERY_S)
        self.longest_cpu_s = max(self.longest_cpu_s, worked_s)
        self._schedule()


def params(**fields: Any) -> Any:
    """Return greedy parameters of a fixed length, final output only."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    fields = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True, **fields}
    return SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)


async def read(collector: Any) -> Any:
    """Read a collector to its end, as vLLM's `generate` does."""
    output = None
    while output is None or not output.finished:
        output = collector.get_nowait() or await collector.get()
    collector.close()
    return output


async def tokens_per_second(add: Callable[..., Awaitable[Any]]) -> tuple[float, float]:
    """Answer new prompts all at once.

    Args:
        add: `add_request` of either engine.

    Returns:
        Tokens a second, and the milliseconds a request that the loop's thread worked.
    """

    async def one(prompt: str) -> int:
        output = await read(await add(f"r{next(_numbers)}", prompt, params()))
        return len(output.outputs[0].token_ids)

    started, cpu = time.perf_counter(), time.thread_time()
    counts = await asyncio.gather(*(one(prompt) for prompt in prompts(CONCURRENT)))
    worked_ms = (time.thread_time() - cpu) * 1e3 / CONCURRENT
    return sum(counts) / (time.perf_counter() - started), worked_ms


async def compared(llm: Any, rounds: int) -> dict[str, float]:
    """Alternate rounds of vLLM's engine and ours.

    Args:
        llm: Ours.
        rounds: Of each.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    async def native(*args: Any) -> Any:
        return await AsyncLLM.add_request(llm, *args)

    plain: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    watches = {True: LoopWatch(), False: LoopWatch()}
    for number in range(rounds):
        # Who goes first changes, so that neither always finds the machine as the other left it.
        order = [(native, plain), (llm.add_request, ours)]
        for add, rates in order if number % 2 == 0 else reversed(order):
            watch = watches[add is native]
            watch.start()
            rates.append(await tokens_per_second(add))
            watch.stop()
            print(f"round {number + 1} of {rounds}: {rates[-1][0]:.0f} tokens/s", file=sys.stderr)
    (plain_rate, plain_ms), (our_rate, our_ms) = (
        [statistics.median(column) for column in zip(*rates, strict=True)]
        for rates in (plain, ours)
    )
    return {
        "plain_tokens_per_s": round(plain_rate, 1),
        "enhanced_tokens_per_s": round(our_rate, 1),
        "ratio": round(our_rate / plain_rate, 3),
        # Of the loop's thread alone, so not of how busy the machine is.
        "plain_loop_ms_a_request": round(plain_ms, 3),
        "enhanced_loop_ms_a_request": round(our_ms, 3),
        # All requests arrive in one turn of the loop, so vLLM's own share is in both.
        "plain_longest_turn_ms": round(watches[True].longest_cpu_s * 1e3, 2),
        "enhanced_longest_turn_ms": round(watches[False].longest_cpu_s * 1e3, 2),
    }


async def hit_ms(llm: Any, *, before: Callable[[], object]) -> dict[str, float]:
    """Ask one question again and again.

    Args:
        llm: Ours; has the answer.
        before: Called before each, outside the measurement.
    """
    (prompt,) = prompts(1)
    await read(await llm.add_request("first", prompt, params()))
    while llm.stats()["side_tasks"]:
        await asyncio.sleep(0.01)
    took, worked = [], []
    for number in range(HITS):
        before()
        started, cpu = time.perf_counter(), time.thread_time()
        collector = await llm.add_request(f"hit-{number}", prompt, params())
        took.append(time.perf_counter() - started)
        worked.append(time.thread_time() - cpu)
        output = await read(collector)
        if not output.metadata["cached"]:
            msg = "the answer was not in the cache"
            raise RuntimeError(msg)
    return {
        "p50_ms": round(statistics.median(took) * 1e3, 3),
        "p99_ms": round(sorted(took)[int(len(took) * 0.99)] * 1e3, 3),
        "cpu_p50_ms": round(statistics.median(worked) * 1e3, 3),
    }


async def semantic_ms(llm: Any) -> dict[str, float]:
    """Ask what was asked before in other words, and wait for the whole answer."""
    from schema.jobs import Reuse
    from workers.engine import RequestScope

    pairs = [
        ("How can I bake sourdough bread?", "How do I bake sourdough bread?"),
        ("What does a glacier look like?", "What do glaciers look like?"),
        ("Is it hard to learn Icelandic?", "Is Icelandic difficult to learn?"),
        ("Where can I buy a used bicycle?", "Where can one buy used bicycles?"),
    ]
    for stored, _ in pairs:
        await read(await llm.add_request("stored", stored, params(max_tokens=64)))
    while llm.stats()["side_tasks"]:
        await asyncio.sleep(0.01)
    took, served = [], 0
    for number in range(40):
        scope = RequestScope(reuse=Reuse.SEMANTIC)
        started = time.perf_counter()
        with scope.active():
            collector = await llm.add_request(
                f"meant-{number}", pairs[number % 4][1], params(max_tokens=64)
            )
        output = await read(collector)
        if output.metadata["provenance"] == "semantic":
            served += 1
            took.append(time.perf_counter() - started)
        llm.forget()
    return {
        "served": served / 40,
        "p50_ms": round(statistics.median(took) * 1e3, 2) if took else float("nan"),
    }


async def first_output_ms(llm: Any) -> dict[str, float]:
    """Stream new prompts one by one, with and without a look-up that finds nothing to serve."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from schema.jobs import Reuse
    from workers.engine import RequestScope

    streamed = SamplingParams(
        temperature=0.0, max_tokens=4, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    took: dict[Reuse, list[float]] = {Reuse.EXACT: [], Reuse.SEMANTIC: []}
    for prompt in prompts(60):
        for reuse, times in took.items():
            started = time.perf_counter()
            with RequestScope(reuse=reuse).active():
                collector = await llm.add_request(
                    f"r{next(_numbers)}", f"{reuse}: {prompt}", streamed
                )
            await collector.get()
            times.append(time.perf_counter() - started)
            await read(collector)
    return {
        f"{reuse}_p50_ms": round(statistics.median(times) * 1e3, 1) for reuse, times in took.items()
    }


@asynccontextmanager
async def started_engine() -> AsyncIterator[Any]:
    """Start the engine on the bundled model, with no enrichment."""
    from workers.bundled import bundled_model
    from workers.engine import EnhancedAsyncLLM, HandlerConfig
    from workers.engine.config import Features

    llm = EnhancedAsyncLLM(
        model=str(bundled_model()),
        max_model_len=2048,
        enforce_eager=True,
        # A processor without instructions for bfloat16 computes several times slower with it.
        dtype="float32",
        handler_config=HandlerConfig(features=Features(nlp=False, similarity=False)),
    )
    try:
        yield llm
    finally:
        await llm.aclose()


async def measure(rounds: int) -> dict[str, Any]:
    """Measure everything.

    Args:
        rounds: Of each engine, for the throughput.
    """
    from workers import local
    from workers.engine import HandlerConfig, Parts
    from workers.engine.config import Features
    from workers.enrich.embedder import MiniLmEmbedder
    from workers.enrich.nlp import SpacyAnalyser
    from workers.store import schema_upgrade
    from workers.store.answers import PostgresAnswers
    from workers.store.database import Database

    results: dict[str, Any] = {"concurrent": CONCURRENT, "max_tokens": MAX_TOKENS}
    with tempfile.TemporaryDirectory() as folder, local.start(Path(folder) / "data") as stack:
        schema_upgrade.upgrade(stack.database_url)
        database = Database(stack.database_url)
        async with started_engine() as llm:
            await tokens_per_second(llm.add_request)  # warm
            results["hit_from_memory"] = await hit_ms(llm, before=lambda: None)
            results["exact_alone"] = await compared(llm, rounds)
            config = HandlerConfig()
            bare = config.model_copy(update={"features": Features(nlp=False, similarity=False)})
            store = PostgresAnswers(database)
            llm._equip(bare, Parts(store=store))
            results["hit_from_postgres"] = await hit_ms(llm, before=llm.forget)
            parts = Parts(
                analyser=SpacyAnalyser(config.nlp),
                embedder=MiniLmEmbedder(config.similarity),
                store=store,
            )
            llm._equip(config, parts)
            await tokens_per_second(llm.add_request)  # starts both child processes
            results["everything_on"] = await compared(llm, rounds)
            results["semantic_hit"] = await semantic_ms(llm)
            results["first_output_on_a_miss"] = await first_output_ms(llm)
            results["failures"] = llm.stats()["failures"]
        await database.aclose()
    return results


def figures(*, quick: bool) -> list[Figure]:
    """Measure everything; a shorter run takes one round of each engine.

    Args:
        quick: Whether it shall be short.
    """
    found = asyncio.run(measure(1 if quick else 3))
    exact, everything = found["exact_alone"], found["everything_on"]
    beside = f"plain: {exact['plain_tokens_per_s']:.0f} tokens/s"
    aimed: dict[str, dict[str, Any]] = {
        "exact_alone.ratio": {"at_least": 0.97, "comparison": beside},
        "everything_on.ratio": {
            "at_least": 0.85,
            "comparison": f"plain: {everything['plain_tokens_per_s']:.0f} tokens/s",
        },
        # The time that the loop's own thread worked at a stretch.
        "everything_on.enhanced_longest_turn_ms": {
            "at_most": 20.0,
            "comparison": f"plain: {everything['plain_longest_turn_ms']:.1f} ms",
        },
        "first_output_on_a_miss.semantic_p50_ms": {
            "comparison": f"without: {found['first_output_on_a_miss']['exact_p50_ms']:.1f} ms",
        },
        "hit_from_memory.p50_ms": {"at_most": 0.2},
        "hit_from_postgres.p50_ms": {"at_most": 2.0},
    }
    return [
        Figure(name=name, value=value, unit=_unit(name), **aimed.get(name, {}))
        for name, value in flattened(found)
    ]


def _unit(name: str) -> str:
    if name.endswith("tokens_per_s"):
        return "tokens/s"
    return "ms" if "ms" in name.rsplit(".", 1)[-1].split("_") else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each engine")
    chosen = parser.parse_args(arguments)
    if not chosen.json:
        print("starting the engine and the embedded stack…", file=sys.stderr)
    results = asyncio.run(measure(chosen.rounds))
    print(json.dumps(results, indent=None if chosen.json else 2))


if __name__ == "__main__":
    main()
