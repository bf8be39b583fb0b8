"""Look-ups among a million vectors: ``python -m tests.benchmarks.million``.

The vectors are made up, since embedding a million prompts would take hours: points around random
centres, in four namespaces. Rows are copied in and the index is built afterwards, which takes some
minutes and 4 GB of memory, so `make bench` leaves it out; ``BENCHMARKS_KEPT=FOLDER`` does it once.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import numpy as np
import psycopg

from schema.tables import EMBEDDER
from tests.benchmarks.figures import Figure, alone
from tests.benchmarks.shelf import SCOPE, Vectors, kept_database
from tests.benchmarks.similarity import NEIGHBOURS, p
from workers.engine.protocols import Neighbour
from workers.store.answers import PostgresAnswers
from workers.store.database import Database

DIMENSIONS = 384
CENTRES = 20_000
LOOK_UPS = 300
NAMESPACES = {"large": 0.8, "middle": 0.15, "small": 0.04, "tiny": 0.01}
_AT_A_TIME = 20_000


def points(count: int, *, seed: int) -> Vectors:
    """Return made-up unit vectors, some near to each other as prompts are.

    Args:
        count: How many.
        seed: Of the noise; the centres are always the same.

    Returns:
        Shape [count, dimensions].
    """
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIMENSIONS), dtype=np.float32)
    noise = np.random.default_rng(seed)
    found = centres[noise.integers(CENTRES, size=count)]
    found += 0.6 * noise.standard_normal((count, DIMENSIONS), dtype=np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def asked_near(stored: Vectors, count: int, *, seed: int) -> Vectors:
    """Return points near to stored ones, as a prompt in other words is to the prompt.

    Args:
        stored: Shape [answers, dimensions].
        count: How many.
        seed: Of which, and of the noise.

    Returns:
        Shape [count, dimensions]; their cosine to what they were made of is about 0.91.
    """
    noise = np.random.default_rng(seed)
    found: Vectors = stored[noise.integers(len(stored), size=count)]
    away = noise.standard_normal((count, DIMENSIONS), dtype=np.float32)
    found = found + 0.45 / np.sqrt(DIMENSIONS, dtype=np.float32) * away
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def made_up_ids(count: int) -> list[UUID]:
    """Return ids as random as real ones are, the same each time.

    Args:
        count: How many.
    """
    made = np.random.default_rng(4).bytes(16 * count)
    return [UUID(bytes=made[at : at + 16], version=4) for at in range(0, len(made), 16)]


def fill(database_url: str, ids: list[UUID], vectors: Vectors, owners: Any) -> None:
    """Copy rows in, and build the index over them.

    Args:
        database_url: Of an empty, migrated database.
        ids: Of the answers.
        vectors: Shape [answers, dimensions].
        owners: Namespace of each.
    """
    address = database_url.replace("+psycopg", "", 1)  # that is SQLAlchemy's word
    with psycopg.connect(address, autocommit=True) as connection:
        (index,) = connection.execute(
            "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_embeddings_minilm_hnsw'"
        ).fetchone() or ("",)
        connection.execute("DROP INDEX ix_embeddings_minilm_hnsw")
        for start in range(0, len(ids), _AT_A_TIME):
            part = range(start, min(start + _AT_A_TIME, len(ids)))
            _copy(connection, _answers(ids, owners, part), "answers", _ANSWER_COLUMNS)
            _copy(
                connection, _embeddings(ids, owners, vectors, part), "embeddings", _VECTOR_COLUMNS
            )
            print(f"{part.stop:,} of {len(ids):,} copied", file=sys.stderr)
        print("building the index…", file=sys.stderr)
        connection.execute("SET maintenance_work_mem = '3GB'")
        connection.execute(index)
        connection.execute("VACUUM ANALYZE answers, embeddings")


_ANSWER_COLUMNS = "id, namespace, fingerprint, engine, model, scope, prompt, outputs, digest"
_VECTOR_COLUMNS = "answer_id, embedder, part, namespace, scope, vector"


def _answers(ids: list[UUID], owners: Any, part: range) -> Iterator[tuple[Any, ...]]:
    for at in part:
        key = ids[at].bytes * 2
        yield ids[at], owners[at], key, SCOPE, "none", SCOPE, f"prompt {at}", "{}", key


def _embeddings(
    ids: list[UUID], owners: Any, vectors: Vectors, part: range
) -> Iterator[tuple[Any, ...]]:
    for at in part:
        vector = "[" + ",".join(f"{value:.4f}" for value in vectors[at]) + "]"
        yield ids[at], EMBEDDER, 0, owners[at], SCOPE, vector


def _copy(
    connection: psycopg.Connection[Any], rows: Iterator[tuple[Any, ...]], table: str, columns: str
) -> None:
    with connection.cursor().copy(f"COPY {table} ({columns}) FROM STDIN") as copy:  # type: ignore[arg-type]
        for row in rows:
            copy.write_row(row)


async def look_ups(
    database_url: str, ids: list[UUID], vectors: Vectors, owners: Any
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Look up, in each namespace, points near to what it holds.

    Returns:
        Seconds of each look-up, and the share that found the true nearest, by namespace.
    """
    database = Database(database_url)
    store = PostgresAnswers(database)
    took: dict[str, list[float]] = {}
    recall: dict[str, float] = {}
    try:
        # A server that has just started reads every page from its files: others are asked first.
        for namespace in NAMESPACES:
            for vector in asked_near(vectors[owners == namespace], 2 * LOOK_UPS, seed=5):
                await _nearest(store, namespace, vector)
        for namespace in NAMESPACES:
            mine = np.flatnonzero(owners == namespace)
            asked = asked_near(vectors[mine], LOOK_UPS, seed=2)
            truth = asked @ vectors[mine].T
            times, found = [], 0
            for vector, row in zip(asked, truth, strict=True):
                started = time.perf_counter()
                near = await _nearest(store, namespace, vector)
                times.append(time.perf_counter() - started)
                right = {ids[mine[at]] for at in np.flatnonzero(row >= row.max() - 2e-3)}
                found += bool(near) and near[0].answer_id in right
            took[namespace], recall[namespace] = times, found / LOOK_UPS
    finally:
        await database.aclose()
    return took, recall


async def _nearest(store: PostgresAnswers, namespace: str, vector: Any) -> Sequence[Neighbour]:
    return await store.nearest(
        namespace=namespace, embedder=EMBEDDER, vector=vector, limit=NEIGHBOURS, scope=SCOPE
    )


def figures(*, quick: bool) -> list[Figure]:
    """Measure at a million; a quick run takes a twentieth of it.

    Args:
        quick: Whether it shall be short.
    """
    return sized(50_000 if quick else 1_000_000)


def sized(answers: int) -> list[Figure]:
    """Measure on a database of its own.

    Args:
        answers: How many vectors.
    """
    vectors = points(answers, seed=1)
    choice = np.random.default_rng(3).choice
    owners = choice(list(NAMESPACES), size=answers, p=list(NAMESPACES.values()))
    ids = made_up_ids(answers)
    with kept_database(f"million-{answers}") as kept:
        if not kept.filled:
            fill(kept.database_url, ids, vectors, owners)
            kept.is_filled()
        took, recall = asyncio.run(look_ups(kept.database_url, ids, vectors, owners))
    everywhere = [one for times in took.values() for one in times]
    return [
        Figure(name="made_up_vectors", value=answers),
        Figure(name="look_up.p50_ms", value=p(everywhere, 0.5) * 1e3, unit="ms", at_most=6.0),
        Figure(name="look_up.p99_ms", value=p(everywhere, 0.99) * 1e3, unit="ms"),
        *(
            Figure(name=f"look_up.{namespace}.p50_ms", value=p(times, 0.5) * 1e3, unit="ms")
            for namespace, times in took.items()
        ),
        *(
            Figure(name=f"look_up.{namespace}.recall", value=share)
            for namespace, share in recall.items()
        ),
    ]


if __name__ == "__main__":
    alone(figures, __doc__)
