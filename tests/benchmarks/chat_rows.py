"""Batch files of chat requests, made by rule: the same at every run."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ASKS = (
    "What is {} best known for, and since when?",
    "Explain to a child how {} works.",
    "How did people manage before {} was invented?",
    "Name three things that most people get wrong about {}.",
    "Write one sentence about {} for a museum's wall.",
    "Why do some people dislike {}?",
    "Which trade depends most on {}, and how?",
    "What would a day without {} look like?",
)
_THINGS = (
    "the lighthouse", "sourdough bread", "the bicycle", "the printing press", "a glacier",
    "the tide", "copper wire", "the violin", "paper money", "the compass", "soap", "glass",
    "the umbrella", "a beehive", "the canal lock", "ink", "the windmill", "rubber", "the clock",
    "salt",
)  # fmt: skip


def questions() -> Iterator[str]:
    """Yield questions without end, no two alike."""
    rounds = itertools.count()
    for number in rounds:
        for thing, ask in itertools.product(_THINGS, _ASKS):
            question = ask.format(thing)
            yield question if number == 0 else f"{question} (Part {number + 1}.)"


def row(name: str, question: str, *, max_tokens: int = 40) -> dict[str, Any]:
    """Return one line of the OpenAI Batch format."""
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": [{"role": "user", "content": question}],
            "max_completion_tokens": max_tokens,
            "temperature": 0,
        },
    }


def write(path: Path, asked: Sequence[str]) -> Path:
    """Write a batch file that asks these questions, in order."""
    lines = (json.dumps(row(f"row-{number}", text)) for number, text in enumerate(asked))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_files(folder: Path, *, rows: int, repeated: float = 0.3) -> tuple[Path, Path]:
    """Write a file of distinct rows, and one of which a share repeats others.

    Args:
        folder: Where to.
        rows: Of each.
        repeated: Share of the second file's rows that ask what another row asks too.

    Returns:
        Both paths.
    """
    source = questions()
    cold = [next(source) for _ in range(rows)]
    distinct = [next(source) for _ in range(rows - round(rows * repeated))]
    chance = random.Random(5)  # noqa: S311  the same file every time
    repeats = distinct + [chance.choice(distinct) for _ in range(rows - len(distinct))]
    chance.shuffle(repeats)
    return write(folder / "cold.jsonl", cold), write(folder / "repeats.jsonl", repeats)
