"""What the order of rows gains: questions about documents, as read and with like next to like.

    python -m tests.benchmarks.prefix_order --json

Each row is a document as system prompt and a question about it; the file goes round the documents,
as an export of a table sorted by question does. vLLM keeps what it computed for a beginning for as
long as there is room. The documents together are made larger than that room, as they are in real
files; so rows in file order find nothing there any more. The worker, the queue and the model are
the real ones, and both orders run on one worker, in namespaces of their own.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from tests.benchmarks import chat_rows
from tests.benchmarks.figures import Figure, alone
from workers.aio_client import AsyncJobClient
from workers.batch import BatchOptions, run_batch
from workers.devices import Device, Fleet
from workers.serving import prepare_environment
from workers.settings import load_settings

#: Room for about 4,000 tokens, where the documents of a full run have 20,000.
ENGINE_ARGS = (
    "--enforce-eager",
    "--max-model-len=2048",
    "--num-gpu-blocks-override=32",
    "--enable-prompt-tokens-details",
)
_WORDS = 600
_START_S = 600.0


def figures(*, quick: bool) -> list[Figure]:
    """Measure rows a second and the share of prompt tokens that were there already, both ways.

    Args:
        quick: Fewer documents.
    """
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as folder:
        Path(folder).chmod(0o755)  # the servers may run as another user
        return asyncio.run(_measure(Path(folder), documents=12 if quick else 32, questions=6))


async def _measure(folder: Path, *, documents: int, questions: int) -> list[Figure]:
    settings = load_settings(data_dir=folder / "data", max_running=16)
    async with AsyncJobClient(settings) as client:
        await client.connection()
        fleet = Fleet(settings, [Device()], engine_args=ENGINE_ARGS)
        fleet.start()
        try:
            await asyncio.to_thread(fleet.wait_ready, _START_S)
            return await compare(client, folder, documents=documents, questions=questions)
        finally:
            await asyncio.to_thread(fleet.stop)


async def compare(
    client: AsyncJobClient, folder: Path, *, documents: int, questions: int
) -> list[Figure]:
    """Run the same rows in both orders.

    Args:
        client: Of a deployment that serves chats.
        folder: Takes the files.
        documents: How many.
        questions: About each.
    """
    source = write(folder / "documents.jsonl", documents=documents, questions=questions)
    as_read = await _run(client, source, folder / "as-read.jsonl", grouped=False)
    grouped = await _run(client, source, folder / "grouped.jsonl", grouped=True)
    told = f"{documents} documents, {questions} questions each"
    return [
        Figure(name="rows_per_s_as_read", value=as_read[0], unit="rows/s", comparison=told),
        Figure(name="rows_per_s_grouped", value=grouped[0], unit="rows/s", comparison=told),
        Figure(
            name="grouping_gain",
            value=grouped[0] / as_read[0],
            at_least=1.0,
            comparison="rows/s, grouped over as read",
        ),
        Figure(name="prefix_share_as_read", value=as_read[1], comparison="of prompt tokens"),
        Figure(name="prefix_share_grouped", value=grouped[1], comparison="of prompt tokens"),
    ]


def write(path: Path, *, documents: int, questions: int) -> Path:
    """Write the file.

    Args:
        path: Where to.
        documents: How many.
        questions: About each.
    """
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(documents, questions))
    return path


def rows(documents: int, questions: int) -> Iterator[dict[str, object]]:
    """Yield the rows in file order: the first question about each document, the second, …

    Args:
        documents: How many.
        questions: About each.
    """
    chance = random.Random(7)  # noqa: S311  the same file every time
    words = " ".join(
        question for question, _ in zip(chat_rows.questions(), range(200), strict=False)
    )
    vocabulary = sorted(set(words.split()))
    texts = [
        f"Document {number}. " + " ".join(chance.choices(vocabulary, k=_WORDS))
        for number in range(documents)
    ]
    for question in range(questions):
        for number, text in enumerate(texts):
            row = chat_rows.row(f"{number}-{question}", f"Question {question}: what is it about?")
            turns = [{"role": "system", "content": text}, *row["body"]["messages"]]
            yield {**row, "body": {**row["body"], "messages": turns, "max_completion_tokens": 4}}


async def _run(
    client: AsyncJobClient, source: Path, target: Path, *, grouped: bool
) -> tuple[float, float]:
    """Return rows a second, and the share of prompt tokens that vLLM found computed."""
    options = BatchOptions(namespace=f"bench-{uuid4().hex[:8]}", grouped=grouped)
    summary = await run_batch(client, str(source), str(target), options)
    if summary.failed:
        msg = f"{summary.failed} rows failed"
        raise RuntimeError(msg)
    return summary.written / summary.elapsed_s, _found_share(target)


def _found_share(target: Path) -> float:
    found = asked = 0
    with target.open("rb") as lines:
        for line in lines:
            usage = json.loads(line)["response"]["body"]["usage"]
            asked += usage["prompt_tokens"]
            found += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return found / max(asked, 1)


if __name__ == "__main__":
    alone(figures, __doc__)
