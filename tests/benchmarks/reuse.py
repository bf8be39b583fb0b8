"""How good reuse by meaning is: ``python -m tests.benchmarks.reuse --data DIR --json``.

Prompts are stored in Postgres and others are asked, through the real embedder, spaCy, pgvector and
guard, at the shipped threshold. DIR holds JSON Lines whose names start with `duplicate_questions`,
`paraphrases`, `different_meaning` and `templated_prompts`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import text

from tests.benchmarks.figures import Figure, flattened
from tests.benchmarks.reuse_plot import write_plot
from tests.benchmarks.shelf import empty_database
from workers.engine.config import NlpConfig, SimilarityConfig
from workers.engine.protocols import PartVector, StoredAnswer, StoredCompletion
from workers.enrich.embedder import MiniLmEmbedder
from workers.enrich.guard import Guard
from workers.enrich.neighbours import NEARER_PER_ADDED_WORD, Similarity
from workers.enrich.nlp import SpacyAnalyser
from workers.store.answers import PostgresAnswers
from workers.store.database import Database

DEFAULT_DATA = Path("../shared/data")
SCOPE = hashlib.sha256(b"reuse benchmark").digest()
SWEPT = [round(0.60 + 0.02 * step, 2) for step in range(20)]
AT_A_TIME = 32


@dataclass(frozen=True, kw_only=True)
class Task:
    """One file: what is stored, what is asked, and which stored prompt would be right."""

    name: str
    stored: Sequence[str]
    asked: Sequence[str]
    own: Sequence[int | None]  # place in `stored`; None: whatever is served is wrong


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One neighbour of an asked prompt, as guard and threshold see it."""

    similarity: float
    own: bool
    allowed: bool
    added: int


@dataclass(kw_only=True)
class Outcome:
    """What came out of one file."""

    asked: int = 0
    served: int = 0
    right: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    seen: list[list[Seen]] = field(default_factory=list)  # of each asked prompt, nearest first


def read_tasks(folder: Path) -> list[Task]:
    """Read the files of a folder.

    Args:
        folder: Where the JSON Lines lie.

    Raises:
        SystemExit: A kind of file is missing.
    """
    groups = [row["questions"] for row in _rows(folder, "duplicate_questions")]
    groups = [group for group in groups if len(group) > 1]
    same = [(row["a"], row["b"]) for row in _rows(folder, "paraphrases")]
    other = [(row["a"], row["b"]) for row in _rows(folder, "different_meaning")]
    prompts = [row["prompt"] for row in _rows(folder, "templated_prompts")]
    half = len(prompts) // 2
    return [
        _pairs("duplicate_questions", [(group[0], group[1]) for group in groups], right=True),
        _pairs("paraphrases", same, right=True),
        _pairs("different_meaning", other, right=False),
        Task(
            name="templated_prompts",
            stored=prompts[:half],
            asked=prompts[half:],
            own=[None] * (len(prompts) - half),
        ),
    ]


def _pairs(name: str, pairs: Sequence[tuple[str, str]], *, right: bool) -> Task:
    return Task(
        name=name,
        stored=[pair[0] for pair in pairs],
        asked=[pair[1] for pair in pairs],
        own=[place if right else None for place in range(len(pairs))],
    )


def _rows(folder: Path, kind: str) -> Iterator[dict[str, str]]:
    paths = sorted(folder.glob(f"{kind}*.jsonl"))
    if not paths:
        sys.exit(f"{folder}: no file whose name starts with {kind} and ends in .jsonl")
    for path in paths:
        yield from (json.loads(line) for line in path.read_text().splitlines() if line.strip())


class Bench:
    """The real parts, on a database of their own.

    Args:
        database: Migrated and empty.
    """

    def __init__(self, database: Database) -> None:
        self.config = SimilarityConfig(budget_s=300.0)
        self.database = database
        self.store = PostgresAnswers(database)
        self.analyser = SpacyAnalyser(NlpConfig(budget_s=300.0))
        self.embedder = MiniLmEmbedder(self.config)
        self.guard = Guard()
        self.similarity = Similarity(
            embedder=self.embedder,
            analyser=self.analyser,
            store=self.store,
            guard=self.guard,
            config=self.config,
        )

    async def run(self, task: Task, *, sweep: bool) -> Outcome:
        """Store what is to be stored, ask what is to be asked.

        Args:
            task: One file.
            sweep: Whether to look at all neighbours too, for other thresholds.
        """
        places: dict[UUID, int] = {}
        for start in range(0, len(task.stored), AT_A_TIME):
            batch = range(start, min(start + AT_A_TIME, len(task.stored)))
            ids = await asyncio.gather(*(self._put(task, place) for place in batch))
            places.update(zip(ids, batch, strict=True))
        async with self.database.connection() as connection:
            # What autovacuum does within a minute; without it the planner takes tables for empty.
            await connection.execute(text("ANALYZE answers, embeddings"))
        outcome = Outcome()
        for start in range(0, len(task.asked), AT_A_TIME):
            batch = range(start, min(start + AT_A_TIME, len(task.asked)))
            await asyncio.gather(*(self._ask(task, at, places, outcome) for at in batch))
            if sweep:
                outcome.seen += await asyncio.gather(
                    *(self._look(task, at, places) for at in batch)
                )
        return outcome

    async def _put(self, task: Task, place: int) -> UUID:
        prompt = task.stored[place]
        analysis, vectors = await asyncio.gather(
            self.analyser.analyse(prompt), self.embedder.embed([prompt])
        )
        answer_id = uuid4()
        await self.store.put(
            StoredAnswer(
                id=answer_id,
                namespace=task.name,
                fingerprint=hashlib.sha256(f"{place} {prompt}".encode()).digest(),
                engine=SCOPE,
                model="none",
                scope=SCOPE,
                prompt=prompt,
                completions=(
                    StoredCompletion(index=0, text=str(place), token_ids=(), finish_reason="stop"),
                ),
                analysis=analysis,
                vectors=(PartVector(part=0, vector=vectors[0], embedder=self.embedder.name),),
            )
        )
        return answer_id

    async def _ask(self, task: Task, at: int, places: dict[UUID, int], outcome: Outcome) -> None:
        answer, considered = await self.similarity.find_reusable(
            task.asked[at], namespace=task.name, scope=SCOPE
        )
        outcome.asked += 1
        outcome.refusals.update(item.rule for item in considered if item.rule is not None)
        if answer is not None:
            outcome.served += 1
            outcome.right += places[answer.id] == task.own[at]

    async def _look(self, task: Task, at: int, places: dict[UUID, int]) -> list[Seen]:
        prompt = task.asked[at]
        analysis, vectors = await asyncio.gather(
            self.analyser.analyse(prompt), self.embedder.embed([prompt])
        )
        seen = []
        for near in await self.store.nearest(
            namespace=task.name,
            embedder=self.embedder.name,
            vector=vectors[0],
            limit=self.config.candidates,
            scope=SCOPE,
        ):
            stored = await self.store.by_id(task.name, near.answer_id)
            if stored is None or stored.analysis is None or near.similarity < SWEPT[0]:
                continue
            verdict = self.guard.check(analysis, stored.analysis)
            seen.append(
                Seen(
                    similarity=near.similarity,
                    own=places[near.answer_id] == task.own[at],
                    allowed=verdict.allowed,
                    added=verdict.added,
                )
            )
        return seen

    async def aclose(self) -> None:
        """End the child processes."""
        await asyncio.gather(self.analyser.aclose(), self.embedder.aclose())


def report(outcomes: dict[str, Outcome]) -> dict[str, dict[str, float]]:
    """Return the shares, between 0 and 1, as the benchmark prints them."""
    figures = {}
    for name, outcome in outcomes.items():
        served = outcome.served / max(1, outcome.asked)
        if name in {"different_meaning", "templated_prompts"}:
            figures[name] = {"wrongly_served": round(served, 4)}
        else:
            right = outcome.right / max(1, outcome.served)
            figures[name] = {"served": round(served, 4), "right": round(right, 4)}
    return figures


def trade_off(outcomes: dict[str, Outcome], *, guarded: bool) -> list[dict[str, float]]:
    """Return, for each threshold, the shares that it would give.

    Args:
        outcomes: By file, made with `sweep`.
        guarded: Whether the guard has a say.
    """
    rows = []
    for threshold in SWEPT:
        row = {"threshold": threshold}
        for name, outcome in outcomes.items():
            first = [_first(seen, threshold, guarded=guarded) for seen in outcome.seen]
            served = [seen for seen in first if seen is not None]
            row[f"{name}.served"] = round(len(served) / max(1, len(first)), 4)
            row[f"{name}.right"] = round(sum(s.own for s in served) / max(1, len(served)), 4)
        rows.append(row)
    return rows


def _first(neighbours: Iterable[Seen], threshold: float, *, guarded: bool) -> Seen | None:
    """Return the neighbour that would be served."""
    for seen in neighbours:
        least = threshold + NEARER_PER_ADDED_WORD * seen.added * guarded
        if seen.similarity >= least and (seen.allowed or not guarded):
            return seen
    return None


async def measure(tasks: Sequence[Task], database_url: str, *, sweep: bool) -> dict[str, Outcome]:
    """Run every file on an empty database.

    Args:
        tasks: What to store and ask.
        database_url: Address of the database.
        sweep: As for `Bench.run`.
    """
    database = Database(database_url, pool_timeout_s=300.0)
    parts = Bench(database)
    try:
        return {task.name: await parts.run(task, sweep=sweep) for task in tasks}
    finally:
        await parts.aclose()
        await database.aclose()


def figures(*, quick: bool) -> list[Figure]:
    """Measure at the shipped threshold, on the files of the default folder.

    Args:
        quick: Makes no difference: fewer prompts would be another measurement.
    """
    del quick
    tasks = read_tasks(DEFAULT_DATA)
    with empty_database() as database_url:
        found = report(asyncio.run(measure(tasks, database_url, sweep=False)))
    aimed: dict[str, dict[str, Any]] = {
        "duplicate_questions.served": {"at_least": 0.55},
        "duplicate_questions.right": {"at_least": 0.985},
        "different_meaning.wrongly_served": {"at_most": 0.08},
        "templated_prompts.wrongly_served": {"at_most": 0.01},
    }
    return [
        Figure(name=name, value=value, **aimed.get(name, {})) for name, value in flattened(found)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the files")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument("--sweep", action="store_true", help="print other thresholds too")
    parser.add_argument("--plot", type=Path, help="write the trade-off as an SVG picture")
    options = parser.parse_args(arguments)
    tasks = read_tasks(options.data)
    sweep = options.sweep or options.plot is not None
    with empty_database() as database_url:
        outcomes = asyncio.run(measure(tasks, database_url, sweep=sweep))
    print(json.dumps(report(outcomes), indent=None if options.json else 2))
    if not options.json:
        for name, outcome in outcomes.items():
            print(name, "refusals by rule:", dict(outcome.refusals.most_common()))
    if options.sweep:
        for guarded in (True, False):
            for row in trade_off(outcomes, guarded=guarded):
                print(json.dumps({"guarded": guarded, **row}))
    if options.plot is not None:
        write_plot(
            options.plot,
            guarded=trade_off(outcomes, guarded=True),
            plain=trade_off(outcomes, guarded=False),
            shipped=SimilarityConfig().threshold,
        )


if __name__ == "__main__":
    main()
