"""What the enhanced engine costs and saves: ``python -m tests.benchmarks.engine --json``.

One process, one engine. Rounds of vLLM's own `add_request` alternate with rounds of ours on the
same engine, so that a noisy machine slows both; the ratio is that of the medians. A turn of the
event loop is what it does between two looks for news: for so long nobody else gets it.
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
from tests.benchmarks.turn_watch import TurnWatch
from workers.pauses import short_pauses
from workers.pinning import let_engine_give_way

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

CONCURRENT = 64
REQUESTS = 4 * CONCURRENT
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


async def tokens_per_second(
    add: Callable[..., Awaitable[Any]], requests: int = CONCURRENT
) -> tuple[float, float]:
    """Answer new prompts, as many at a time as `CONCURRENT`; the first of them all at once.

    Args:
        add: `add_request` of either engine.
        requests: How many.

    Returns:
        Tokens a second, and the milliseconds a request that the loop's thread worked.
    """
    places = asyncio.Semaphore(CONCURRENT)

    async def one(prompt: str) -> int:
        async with places:
            output = await read(await add(f"r{next(_numbers)}", prompt, params()))
        return len(output.outputs[0].token_ids)

    started, cpu = time.perf_counter(), time.thread_time()
    counts = await asyncio.gather(*(one(prompt) for prompt in prompts(requests)))
    worked_ms = (time.thread_time() - cpu) * 1e3 / requests
    return sum(counts) / (time.perf_counter() - started), worked_ms


async def settled(llm: Any) -> None:
    """Wait until nothing is left to be found out or stored.

    Args:
        llm: Ours.
    """
    while llm.stats()["side_tasks"]:
        await asyncio.sleep(0.01)


async def compared(llm: Any, rounds: int) -> dict[str, Any]:
    """Alternate rounds of vLLM's engine and ours.

    A round is several times as long as what ours has still to store when it is over, and the next
    begins when that is done, so that neither pays for the other. The sustained rate counts the time
    until that is done too; under lasting load the truth lies between the two.

    Args:
        llm: Ours.
        rounds: Of each.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    async def native(*args: Any) -> Any:
        return await AsyncLLM.add_request(llm, *args)

    plain: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    sustained: dict[bool, list[float]] = {True: [], False: []}
    watches = {True: TurnWatch(), False: TurnWatch()}
    for number in range(rounds):
        # Who goes first changes, so that neither always finds the machine as the other left it.
        order = [(native, plain), (llm.add_request, ours)]
        for add, rates in order if number % 2 == 0 else reversed(order):
            started = time.perf_counter()
            with watches[add is native].watching():
                rates.append(await tokens_per_second(add, REQUESTS))
                await settled(llm)
            sustained[add is native].append(1 / (time.perf_counter() - started))
            print(f"round {number + 1} of {rounds}: {rates[-1][0]:.0f} tokens/s", file=sys.stderr)
    (plain_rate, plain_ms), (our_rate, our_ms) = (
        [statistics.median(column) for column in zip(*rates, strict=True)]
        for rates in (plain, ours)
    )
    return {
        "plain_tokens_per_s": round(plain_rate, 1),
        "enhanced_tokens_per_s": round(our_rate, 1),
        "ratio": round(our_rate / plain_rate, 3),
        "sustained_ratio": round(
            statistics.median(sustained[False]) / statistics.median(sustained[True]), 3
        ),
        # Of the loop's thread alone, so not of how busy the machine is.
        "plain_loop_ms_a_request": round(plain_ms, 3),
        "enhanced_loop_ms_a_request": round(our_ms, 3),
        "plain_turn": watches[True].summary(),
        "enhanced_turn": watches[False].summary(),
    }


async def hit_ms(llm: Any, *, before: Callable[[], object]) -> dict[str, float]:
    """Ask one question again and again.

    Args:
        llm: Ours; has the answer.
        before: Called before each, outside the measurement.
    """
    (prompt,) = prompts(1)
    await read(await llm.add_request("first", prompt, params()))
    await settled(llm)
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
    await settled(llm)
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
    for number, prompt in enumerate(prompts(80)):
        # What one leaves to be stored must not fall to the other, so each begins when that is done.
        for reuse in (Reuse.EXACT, Reuse.SEMANTIC) if number % 2 else (Reuse.SEMANTIC, Reuse.EXACT):
            started = time.perf_counter()
            with RequestScope(reuse=reuse).active():
                collector = await llm.add_request(
                    f"r{next(_numbers)}", f"{prompt} {reuse}", streamed
                )
            await collector.get()
            took[reuse].append(time.perf_counter() - started)
            await read(collector)
            await settled(llm)
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
            let_engine_give_way()  # as a worker does
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
            await settled(llm)
            with short_pauses():  # as a worker has them
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
        "everything_on.sustained_ratio": {"at_least": 0.85},
        **{
            f"everything_on.enhanced_turn.longest_{clock}_ms": {
                "at_most": 20.0,
                "comparison": f"plain: {everything['plain_turn'][f'longest_{clock}_ms']:.1f} ms",
            }
            for clock in ("wall", "own", "cpu")
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
