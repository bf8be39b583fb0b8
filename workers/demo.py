"""The main job on real input: ``make demo``.

A file of questions goes through queue, engine and store; the same file again comes from the cache;
then one result is polled, with what was found out about its prompt. Everything runs on an embedded
stack of its own, in a folder that is removed at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from schema.errors import PromptmillError
from workers.aio_client import AsyncJobClient
from workers.batch import BatchProgress, run_batch
from workers.devices import Device, Fleet
from workers.settings import load_settings

if TYPE_CHECKING:
    from workers.settings import Settings

QUESTIONS = Path(__file__).parent.parent / "examples" / "questions.jsonl"
_ONE_MORE = "What is the capital of Italy, and why do so many people visit it?"
_console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def main() -> int:
    """Run the demonstration.

    Returns:
        An exit code: 0 when every question was answered.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="promptmill-demo-") as folder:
        settings = load_settings(data_dir=Path(folder) / "data", namespace="demo")
        try:
            return asyncio.run(_demo(settings, Path(folder), started))
        except PromptmillError as exc:
            _console.print(f"[red]the demo could not be run:[/red] {exc}", markup=True)
            return 1


async def _demo(settings: Settings, folder: Path, started: float) -> int:
    _console.rule("promptmill: the main job on real input")
    async with AsyncJobClient(settings) as client:
        with _console.status("starting Postgres, Valkey and a worker with vLLM"):
            await client.connection()
            fleet = Fleet(settings, [Device()], on_event=lambda _text: None)
            fleet.start()
            try:
                await asyncio.to_thread(fleet.wait_ready)
            except BaseException:
                await asyncio.to_thread(fleet.stop)
                raise
        _console.print(f"stack and worker are up after {time.monotonic() - started:.0f} s")
        try:
            return await _run(client, folder, started)
        finally:
            with _console.status("stopping"):
                await asyncio.to_thread(fleet.stop)


async def _run(client: AsyncJobClient, folder: Path, started: float) -> int:
    first = await _pass(client, folder / "first.jsonl", "first pass ")
    second = await _pass(client, folder / "second.jsonl", "second pass")
    answers, again = _texts(folder / "first.jsonl"), _texts(folder / "second.jsonl")
    for name in list(answers)[:3]:
        _console.print(f"  [dim]{name}:[/dim] {answers[name]!r}", markup=True)
    same = sum(answers[name] == again.get(name) for name in answers)
    _console.print(
        f"{len(answers)} answered in {first.elapsed_s:.2f} s by vLLM; again in "
        f"{second.elapsed_s:.2f} s, {second.cached} from the cache, {same} word for word the same: "
        f"[bold]{first.elapsed_s / second.elapsed_s:.0f} times as fast[/bold]",
        markup=True,
    )
    await _one_result(client)
    _console.rule(f"done after {time.monotonic() - started:.0f} s")
    whole = len(answers) == same == first.read and not first.failed and not second.failed
    return 0 if whole else 1


async def _pass(client: AsyncJobClient, target: Path, label: str) -> BatchProgress:
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = sum(1 for _ in QUESTIONS.open())
    with Progress(*columns, console=_console) as bar:
        task = bar.add_task(label, total=total)
        return await run_batch(
            client,
            str(QUESTIONS),
            str(target),
            on_progress=lambda state: bar.update(task, completed=state.written),
        )


async def _one_result(client: AsyncJobClient) -> None:
    _console.print(f"\none more, polled: {_ONE_MORE!r}")
    job = await client.submit(
        url="/v1/chat/completions",
        body={
            "messages": [{"role": "user", "content": _ONE_MORE}],
            "max_completion_tokens": 48,
            "temperature": 0,
        },
    )
    result = await job.result(timeout_s=120)
    found: dict[str, Any] = result.metadata.get("nlp_result") or {}
    _console.print(f"  answer       {result.text!r}", markup=False)
    _console.print(f"  provenance   {result.metadata.get('provenance')}", markup=False)
    _console.print(f"  entities     {[item['text'] for item in found.get('entities', ())]}")
    _console.print(f"  noun phrases {found.get('noun_phrases')}", markup=False)
    _console.print(f"  clauses      {found.get('clauses')}", markup=False)
    for near in result.metadata.get("similar") or ():
        _console.print(f"  neighbour    {near['similarity']:.3f}  {near['prompt']}", markup=False)
    for part, why in (result.metadata.get("errors") or {}).items():
        _console.print(f"  failed       {part}: {why}", markup=False)


def _texts(path: Path) -> dict[str, str | None]:
    answers: dict[str, str | None] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        body = (row["response"] or {}).get("body") or {}
        choices = body.get("choices") or [{}]
        answers[row["custom_id"]] = (choices[0].get("message") or {}).get("content")
    return answers


if __name__ == "__main__":
    sys.exit(main())
