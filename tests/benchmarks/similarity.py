"""How long it takes to find what was asked before: ``python -m tests.benchmarks.similarity``.

Look-ups among 100,000 answers with real vectors, under the filter by namespace that every query
has, and how many find the true nearest; then guarded hits by meaning, embedding and analysis
included. Prompts are made up from a dictionary, and embedded by the model that workers use; what is
looked up are stored prompts in a few more words.

To embed and store them takes ten minutes; ``BENCHMARKS_KEPT=FOLDER`` does it once.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from uuid import UUID

import numpy as np

from tests.benchmarks.figures import Figure, alone
from tests.benchmarks.shelf import (
    ASKED_TWICE,
    SCOPE,
    Kept,
    Shelf,
    Vectors,
    asked_otherwise,
    embedded,
    kept_database,
    opened,
    prompts,
    words,
)

#: Namespaces, and what share of the answers each has.
SHARES = {"large": 0.8, "middle": 0.15, "small": 0.04, "tiny": 0.01}
LOOK_UPS = 300
HITS = 200
NEIGHBOURS = 5


def p(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies.

    Args:
        values: Any order.
        share: 0 to 1.
    """
    return float(np.quantile(values, share))


async def look_ups(
    shelf: Shelf, namespace: str, ids: Sequence[UUID], vectors: Vectors, asked: Vectors
) -> tuple[list[float], float]:
    """Look vectors up in one namespace.

    Args:
        shelf: Filled.
        namespace: Tenant.
        ids: Of its answers.
        vectors: Of its answers, shape [answers, dimensions].
        asked: Shape [look-ups, dimensions].

    Returns:
        Seconds of each look-up, and the share that found the true nearest.
    """
    took, found = [], 0
    truth = asked @ vectors.T
    for at, vector in enumerate(asked):
        started = time.perf_counter()
        near = await shelf.store.nearest(
            namespace=namespace,
            embedder=shelf.embedder.name,
            vector=vector,
            limit=NEIGHBOURS,
            scope=SCOPE,
        )
        took.append(time.perf_counter() - started)
        best = float(truth[at].max())
        # Two prompts may be equally near: vectors are stored as half floats.
        right = {ids[place] for place in np.flatnonzero(truth[at] >= best - 2e-3)}
        found += bool(near) and near[0].answer_id in right
    return took, found / len(asked)


async def hits(shelf: Shelf, namespace: str, asked: Sequence[str]) -> tuple[list[float], int]:
    """Ask in other words, one after the other.

    Args:
        shelf: Filled.
        namespace: Tenant.
        asked: Prompts.

    Returns:
        Seconds of each that was served, and how many were.
    """
    took = []
    for prompt in asked:
        started = time.perf_counter()
        answer, _ = await shelf.similarity.find_reusable(prompt, namespace=namespace, scope=SCOPE)
        if answer is not None:
            took.append(time.perf_counter() - started)
    return took, len(took)


def pairs(count: int) -> list[tuple[str, str]]:
    """Return prompts, each in two ways.

    Args:
        count: How many.
    """
    return [
        (one.format(word), other.format(word))
        for word, (one, other) in zip(words(count), ASKED_TWICE * count, strict=False)
    ]


async def measure(kept: Kept, answers: int) -> list[Figure]:
    """Fill, look up, ask.

    Args:
        kept: A migrated database, empty or filled by an earlier run.
        answers: How many are stored.
    """
    print(f"embedding {answers:,} prompts…", file=sys.stderr)
    texts = prompts(answers)
    vectors = kept.array("vectors", lambda: embedded(texts))
    otherwise = asked_otherwise(answers)
    generator = np.random.default_rng(0)
    owner = generator.choice(list(SHARES), size=len(texts), p=list(SHARES.values()))
    twice = pairs(HITS)
    async with opened(kept.database_url) as shelf:
        ids: dict[str, list[UUID]] = {}
        for namespace in SHARES:
            mine = np.flatnonzero(owner == namespace)
            there = [texts[i] for i in mine]
            if not kept.filled:
                await shelf.fill(namespace, there, vectors[mine])
            ids[namespace] = await shelf.ids(namespace, there)
        if not kept.filled:
            stored = [one for one, _ in twice]
            await shelf.fill("hits", stored, embedded(stored), analysed=True)
            await shelf.settle()
            kept.is_filled()
        figures, everywhere = [], []
        for namespace in SHARES:
            places = np.flatnonzero(owner == namespace)
            theirs = vectors[places]
            some = places[:: max(1, len(places) // LOOK_UPS)][:LOOK_UPS]
            asked = embedded([otherwise[place] for place in some])
            await look_ups(shelf, namespace, ids[namespace], theirs, asked[:20])  # warm
            took, recall = await look_ups(shelf, namespace, ids[namespace], theirs, asked)
            everywhere += took
            figures += [
                Figure(name=f"look_up.{namespace}.p50_ms", value=p(took, 0.5) * 1e3, unit="ms"),
                Figure(name=f"look_up.{namespace}.recall", value=recall, at_least=0.98),
            ]
        served = await _hits(shelf, [other for _, other in twice])
    return [
        Figure(name="answers", value=len(texts)),
        Figure(
            name="look_up.p50_ms", value=statistics.median(everywhere) * 1e3, unit="ms", at_most=3.0
        ),
        Figure(name="look_up.p99_ms", value=p(everywhere, 0.99) * 1e3, unit="ms"),
        *figures,
        *served,
    ]


async def _hits(shelf: Shelf, asked: Sequence[str]) -> list[Figure]:
    await hits(shelf, "hits", asked[:20])  # warm
    took, served = await hits(shelf, "hits", asked)
    embedding = []
    for prompt in asked:
        started = time.perf_counter()
        await shelf.embedder.embed([prompt])
        embedding.append(time.perf_counter() - started)
    return [
        Figure(
            name="guarded_hit.p50_ms",
            value=p(took, 0.5) * 1e3,
            unit="ms",
            at_most=15.0,
            comparison=f"embedding alone: {p(embedding, 0.5) * 1e3:.1f} ms",
        ),
        Figure(name="guarded_hit.p99_ms", value=p(took, 0.99) * 1e3, unit="ms"),
        Figure(name="guarded_hit.served", value=served / len(asked)),
    ]


def figures(*, quick: bool) -> list[Figure]:
    """Measure look-ups and hits.

    Args:
        quick: With 10,000 answers.
    """
    return sized(10_000 if quick else 100_000)


def sized(answers: int) -> list[Figure]:
    """Measure on a database of its own.

    Args:
        answers: How many are stored.
    """
    with kept_database(f"similarity-{answers}") as kept:
        return asyncio.run(measure(kept, answers))


if __name__ == "__main__":
    alone(figures, __doc__)
