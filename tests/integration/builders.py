"""Small values that tests of the store are made of."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from sqlalchemy import text

from schema.jobs import JobOptions, JobResult, JobSpec, JobState, PromptRequest
from schema.tables import EMBEDDER, EMBEDDING_DIMENSIONS
from workers.engine.protocols import (
    Analysis,
    Entity,
    Neighbour,
    PartVector,
    StoredAnswer,
    StoredCompletion,
    Token,
    Vector,
)
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.records import ClaimedJob, Outcome

LONG_LEASE_S = 300.0


def spec(prompt: str = "What is AI?", **fields: Any) -> JobSpec:
    options = {k: fields.pop(k) for k in ("stream", "max_attempts") if k in fields}
    return JobSpec(request=PromptRequest(prompt=prompt), options=JobOptions(**options), **fields)


async def admit(store: JobStore, *specs: JobSpec, sent: bool = True) -> list[UUID]:
    await store.admit(specs, default_model="m", sent=sent, max_attempts=3)
    return [each.id for each in specs]


async def claimed(store: JobStore, *specs: JobSpec, lease_s: float = LONG_LEASE_S) -> ClaimedJob:
    """Write jobs, claim them, and return the first."""
    ids = await admit(store, *(specs or (spec(),)))
    claim = await store.claim(ids, owner="w1", lease_s=lease_s)
    return next(job for job in claim.jobs if job.id == ids[0])


def outcome(job: ClaimedJob, *, words: str = "Paris.", **fields: Any) -> Outcome:
    state = fields.pop("state", JobState.DONE)
    result = JobResult(
        job_id=job.id,
        namespace=job.namespace,
        status=state,
        token=job.token,
        text=words,
        error=fields.pop("error", None),
    )
    return Outcome(job_id=job.id, token=job.token, result=result, **fields)


async def let_leases_end(database: Database, ids: Iterable[UUID]) -> None:
    await change(
        database,
        "UPDATE jobs SET lease_until = now() - interval '1 second' "
        "WHERE state = 'running' AND id = ANY(CAST(:ids AS uuid[]))",
        ids=list(ids),
    )


async def change(database: Database, statement: str, **values: Any) -> None:
    async with database.connection() as connection:
        await connection.execute(text(statement), values)


async def number(database: Database, statement: str, **values: Any) -> Any:
    async with database.connection() as connection:
        return await connection.scalar(text(statement), values)


def unit_vectors(count: int, *, seed: int = 0) -> Vector:
    found = np.random.default_rng(seed).normal(size=(count, EMBEDDING_DIMENSIONS))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def analysis(words: str = "What is AI?") -> Analysis:
    return Analysis(
        text=words,
        pipeline="test-1",
        language="en",
        sentences=(words,),
        entities=(Entity(text="AI", label="ORG", start=8, end=10),),
        clauses=("What is AI?",),
        tokens=(Token(text="AI", lemma="ai", pos="PROPN", tag="NNP", dep="attr", head=0),),
    )


def answer(words: str = "A field.", **fields: Any) -> StoredAnswer:
    values: dict[str, Any] = {
        "id": uuid4(),
        "namespace": "default",
        "fingerprint": uuid4().bytes * 2,
        "engine": b"engine",
        "model": "m",
        "prompt": "What is AI?",
        "completions": (
            StoredCompletion(index=0, text=words, token_ids=(1, 2, 3), finish_reason="stop"),
        ),
        "created_at": time.time(),
    }
    return StoredAnswer(**{**values, **fields})


def full_answer(**fields: Any) -> StoredAnswer:
    """An answer with everything that can be stored."""
    completion = StoredCompletion(
        index=0,
        text="NUL \x00 and half \ud83d of a pair, and ü😀",
        token_ids=(0, 151_000),
        finish_reason="length",
        stop_reason="stop here",
        cumulative_logprob=-1.25e-9,
        logprobs=(((7, float("-inf"), 3, "\x00"), (8, -0.5, None, None)), ((9, 0.0, 1, "a"),)),
    )
    plain = StoredCompletion(
        index=1, text="NaN, Infinity and \\u0000", token_ids=(), finish_reason=None, stop_reason=2
    )
    return answer(
        completions=(completion, plain),
        prompt_logprobs=(None, ((1, -0.25, 1, "What"),)),
        analysis=analysis(),
        similar=(Neighbour(answer_id=uuid4(), prompt="Why?", similarity=0.75, clause="c"),),
        enrichments={"plug-in": {"score": 0.5, "none": None, "list": [1, "\x00"]}},
        vectors=(
            PartVector(part=0, vector=unit_vectors(1)[0], embedder=EMBEDDER),
            PartVector(part=1, vector=unit_vectors(2)[1], embedder=EMBEDDER, clause="What"),
        ),
        scope=b"scope",
        prompt_tokens=5,
        completion_tokens=2,
        engine_s=0.25,
        tags=("doc-1", "v2"),
        **fields,
    )
