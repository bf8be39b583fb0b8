"""Tiny in-memory parts that tests of the engine are made of."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from workers.engine.flight import Flight, Stream
from workers.engine.pace import Pace
from workers.engine.protocols import (
    Analysis,
    Decision,
    Neighbour,
    StoredAnswer,
    StoredCompletion,
    Vector,
)


def piece(
    text: str, ids: Sequence[int], *, index: int = 0, end: str | None = None, logprobs: bool = False
) -> CompletionOutput:
    """Return a delta of one completion."""
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=list(ids),
        cumulative_logprob=-1.0 if logprobs else None,
        logprobs=[{token: Logprob(-1.0, 1, text)} for token in ids] if logprobs else None,
        finish_reason=end,
    )


def output(*pieces: CompletionOutput, finished: bool = False) -> RequestOutput:
    """Return a native output."""
    return RequestOutput(
        request_id="native",
        prompt="p",
        prompt_token_ids=[1, 2],
        prompt_logprobs=None,
        outputs=list(pieces),
        finished=finished,
    )


def answer(
    fingerprint: bytes = b"f", *, namespace: str = "n", text: str = "an answer", **fields: Any
) -> StoredAnswer:
    """Return a stored answer."""
    return StoredAnswer(
        id=fields.pop("id", None) or uuid4(),
        namespace=namespace,
        fingerprint=fingerprint,
        engine=b"e",
        model=fields.pop("model", "m"),
        completions=(StoredCompletion(index=0, text=text, token_ids=(5, 6), finish_reason="stop"),),
        **fields,
    )


@dataclass
class Native:
    """A generation that a test drives, as vLLM's `add_request` and `abort` would."""

    collector: RequestOutputCollector = field(
        default_factory=lambda: RequestOutputCollector(RequestOutputKind.DELTA, "native-1")
    )
    aborted: list[str] = field(default_factory=list)
    refusal: Exception | None = None
    started: int = 0
    may_start: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_start.set()

    async def start(self) -> RequestOutputCollector:
        """Accept the request, or refuse it."""
        await self.may_start.wait()
        self.started += 1
        if self.refusal is not None:
            raise self.refusal
        return self.collector

    async def abort(self, request_id: str) -> None:
        """Note what is aborted."""
        self.aborted.append(request_id)

    def flight(self, *, stored: RequestOutput | None = None) -> Flight:
        """Return a flight over this generation; `stored` is what the store would have."""
        self.landed: list[Flight] = []
        self.gone: list[Flight] = []

        async def look_up(stream: Stream) -> bool:
            if stored is not None:
                stream.transcript.add(stored)
            return stored is not None

        return Flight(
            look_up=look_up,
            start=self.start,
            abort=self.abort,
            turn=Pace().turn,
            landed=self.landed.append,
            gone=self.gone.append,
            streams=True,
        )


class MemoryStore:
    """An `AnswerStore` in a dictionary."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, bytes], StoredAnswer] = {}
        self.decisions: list[Decision] = []
        self.near: list[Neighbour] = []
        self.failure: Exception | None = None

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def get(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        self._check()
        return self.answers.get((namespace, fingerprint))

    async def by_id(self, namespace: str, answer_id: UUID) -> StoredAnswer | None:
        self._check()
        found = (one for one in self.answers.values() if one.id == answer_id)
        return next((one for one in found if one.namespace == namespace), None)

    async def put(self, answer: StoredAnswer) -> None:
        self._check()
        self.answers[answer.namespace, answer.fingerprint] = answer

    async def nearest(
        self,
        *,
        namespace: str,
        embedder: str,
        vector: Vector,
        limit: int,
        scope: bytes | None = None,
    ) -> Sequence[Neighbour]:
        self._check()
        return self.near[:limit]

    async def record(self, decisions: Sequence[Decision]) -> None:
        self._check()
        self.decisions += decisions


class WordAnalyser:
    """An `Analyser` that takes each line for a clause."""

    pipeline = "words-1"

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.calls = 0
        self.free = asyncio.Event()
        self.free.set()
        self.closed = 0

    async def analyse(self, text: str) -> Analysis:
        self.calls += 1
        await self.free.wait()
        if self.failure is not None:
            raise self.failure
        lines = tuple(text.split("\n"))
        return Analysis(
            text=text,
            pipeline=self.pipeline,
            sentences=lines,
            clauses=lines if len(lines) > 1 else (),
        )

    async def aclose(self) -> None:
        self.closed += 1


class LengthEmbedder:
    """An `Embedder` whose vectors say how long a text is."""

    name = "length"
    dimensions = 2

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.texts: list[str] = []

    async def embed(self, texts: Sequence[str]) -> Any:
        self.texts += texts
        if self.failure is not None:
            raise self.failure
        angles = np.array([len(text) / 100 for text in texts], dtype=np.float32)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    async def aclose(self) -> None:
        """Nothing runs."""
