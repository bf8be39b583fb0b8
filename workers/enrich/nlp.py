"""`SpacyAnalyser`: what spaCy finds in a text, in a process of its own."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from typing import TYPE_CHECKING

from workers.engine.protocols import Analysis, Entity, Token
from workers.enrich.batching import ModelProcess

if TYPE_CHECKING:
    from workers.engine.config import NlpConfig

#: A reply above this many bytes takes long enough to read that it is done beside the loop.
_READ_ASIDE_BYTES = 32 * 1024


class SpacyAnalyser:
    """An `Analyser` over a spaCy pipeline.

    Args:
        config: Pipeline, bound on waiting texts, time budget and length of a text.
    """

    def __init__(self, config: NlpConfig) -> None:
        self._model = config.model
        self._pipeline = f"{config.model}-{_version(config.model)}"
        self._process = ModelProcess(
            kind="spacy",
            config={"model": config.model, "max_chars": config.max_chars},
            max_waiting=config.concurrency,
            budget_s=config.budget_s,
        )

    @property
    def pipeline(self) -> str:
        """Name and version; results of different pipelines are never mixed."""
        return self._pipeline

    @property
    def pid(self) -> int | None:
        """Process id of the running child, if there is one."""
        return self._process.pid

    @property
    def restarts(self) -> int:
        """How often the child had to be replaced."""
        return self._process.restarts

    def stay_on(self, cores: frozenset[int]) -> None:
        """Run the process on some cores only; see `ModelProcess.stay_on`."""
        self._process.stay_on(cores)

    async def start(self) -> None:
        """Load the pipeline now rather than with the first text.

        Raises:
            EnrichmentUnavailableError: It cannot be loaded.
        """
        await self._process.start()

    async def analyse(self, text: str) -> Analysis:
        """Analyse one text.

        Args:
            text: Of any length; what several tasks ask for at a time is done in one batch.

        Returns:
            What was found, up to the configured length of text.

        Raises:
            EnrichmentError: As its subclasses say: over the budget, too many waiting, no process.
        """
        (payload,) = await self._process.submit([text])
        if len(payload) > _READ_ASIDE_BYTES:
            return await asyncio.to_thread(self._read, text, payload)
        return self._read(text, payload)

    async def aclose(self) -> None:
        """End the process; idempotent."""
        await self._process.aclose()

    def _read(self, text: str, payload: bytes) -> Analysis:
        data = json.loads(payload)
        return Analysis(
            text=text,
            pipeline=self._pipeline,
            language=data["language"],
            sentences=tuple(data["sentences"]),
            entities=tuple(
                Entity(text=name, label=label, start=start, end=end)
                for name, label, start, end in data["entities"]
            ),
            noun_phrases=tuple(data["noun_phrases"]),
            connectives=tuple(data["connectives"]),
            clauses=tuple(data["clauses"]),
            tokens=tuple(
                Token(
                    text=word,
                    lemma=lemma,
                    pos=pos,
                    tag=tag,
                    dep=dep,
                    head=head,
                    ent=ent,
                    start=start,
                )
                for word, lemma, pos, tag, dep, head, ent, start in data["tokens"]
            ),
            truncated=data["truncated"],
        )


def _version(model: str) -> str:
    """Return the installed version of a pipeline's package, as far as it tells."""
    try:
        return importlib.metadata.version(model.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "0"
