"""Batch runs against real servers; the worker is played by the job store."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import re
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import orjson
import pytest
import zstandard
from pydantic import SecretStr
from redis.asyncio import Redis

from schema import names, wire
from schema.errors import InvalidFileError
from schema.jobs import JobError, JobResult, JobState, Provenance
from workers import AsyncJobClient, Settings
from workers.batch import BatchOptions, BatchProgress, run_batch
from workers.batch_jobs import (
    cancel_batch,
    collect,
    describe,
    list_batches,
    submit_batch,
    wait_until_over,
)
from workers.cancellation import heed_cancellation
from workers.channel import ResultChannel
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.records import Outcome
from workers.store.schema_upgrade import upgrade

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.local import LocalStack

URL = "/v1/chat/completions"


def row(name: str, **body: Any) -> dict[str, Any]:
    """Return one request."""
    return {"custom_id": name, "method": "POST", "url": URL, "body": {"say": name, **body}}


def write(path: Path, rows: list[Any]) -> str:
    """Write a batch file; text is written as it is."""
    lines = [item if isinstance(item, str) else json.dumps(item) for item in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read(path: Path | str) -> dict[str, dict[str, Any]]:
    """Return the lines of an output by their names."""
    with Path(path).open("rb") as file:
        lines = [json.loads(line) for line in file]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "a row was written twice"
    return found


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(path.name for path in folder.iterdir())


BROKE = JobError(type="EngineFailedError", message="broke")


def text_of(body: dict[str, Any]) -> str | None:
    """Return the text of an answer."""
    (choice,) = body.get("choices") or [{}]
    return (choice.get("message") or {}).get("content")


class PlayedWorker:
    """Answers all that comes for one model with what the body says; may be told to tire."""

    def __init__(self, redis: Redis, store: JobStore, model: str) -> None:
        self.redis, self.store = redis, store
        self.queue = names.priority_list(names.queue(model), names.DEFAULT_PRIORITY)
        self.channel = ResultChannel(redis)
        self.ran: list[str] = []
        self.most: int | None = None
        self.left: list[UUID] = []
        self.publishes = True

    @staticmethod
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        """Return what is answered."""
        return {"choices": [{"finish_reason": body.get("end", "stop")}], **body}

    async def work(self) -> None:
        """Run until cancelled."""
        while True:
            heed_cancellation()
            item = await self.redis.rpop(self.queue)
            if item is None:
                await asyncio.sleep(0.01)
                continue
            assert isinstance(item, (str, bytes))
            message = wire.decode(json.loads(item)["headers"][names.JOBS_HEADER])
            claim = await self.store.claim(message.ids, owner="played", lease_s=30)
            for at, job in enumerate(claim.jobs):
                if self.most is not None and len(self.ran) >= self.most:
                    rest = {job.id: job.token for job in claim.jobs[at:]}
                    self.left = [job.id for job in await self.store.release(rest)]
                    return
                body = job.request["body"]
                self.ran.append(body.get("say") or body.get("input") or body["messages"][-1])
                done = self.reply(body)
                failed = bool(body.get("fail"))
                result = JobResult(
                    job_id=job.id,
                    namespace=job.namespace,
                    status=JobState.FAILED if failed else JobState.DONE,
                    token=job.token,
                    custom_id=job.custom_id,
                    text=None if failed else text_of(done),
                    body=done,
                    metadata={"provenance": "generated"},
                    error=BROKE if failed else None,
                )
                outcome = Outcome(
                    job_id=job.id,
                    token=job.token,
                    result=result,
                    provenance=None if failed else Provenance.GENERATED,
                )
                await self.store.finish([outcome])
                if self.publishes:
                    await self.channel.publish([(job.channel, result)])


@pytest.fixture
def settings(stack: LocalStack) -> Settings:
    """Both servers, a tenant and a model of this test's own."""
    upgrade(stack.database_url)
    return Settings(
        database_url=SecretStr(stack.database_url),
        redis_url=SecretStr(stack.redis_url),
        namespace=f"n{uuid4().hex}",
        served_model_name=f"m{uuid4().hex}",
        message_jobs=8,
    )


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[AsyncJobClient]:
    """Submits the rows."""
    async with AsyncJobClient(settings) as client:
        yield client


@pytest.fixture
async def worker(settings: Settings, stack: LocalStack) -> AsyncIterator[PlayedWorker]:
    """Somebody who answers."""
    redis = Redis.from_url(stack.redis_url)
    database = Database(stack.database_url)
    assert settings.served_model_name
    worker = PlayedWorker(redis, JobStore(database), settings.served_model_name)
    task = asyncio.create_task(worker.work())
    yield worker
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await database.aclose()
    await redis.aclose()


async def run(
    client: AsyncJobClient, source: str, target: Path | str, **options: Any
) -> BatchProgress:
    """Run a batch with a limit on its time."""
    async with asyncio.timeout(60):
        return await run_batch(client, source, str(target), BatchOptions(**options))


async def test_every_row_is_answered(client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path):
    source = write(tmp_path / "in.jsonl", [row(f"r{n}") for n in range(100)])
    seen: list[int] = []
    async with asyncio.timeout(60):
        summary = await run_batch(
            client,
            source,
            str(tmp_path / "out.jsonl"),
            on_progress=lambda progress: seen.append(progress.written),
        )
    out = read(tmp_path / "out.jsonl")
    assert out.keys() == {f"r{n}" for n in range(100)}
    assert all(line["response"]["body"]["say"] == name for name, line in out.items())
    assert (summary.read, summary.written, summary.failed) == (100, 100, 0)
    assert summary.provenance == {"generated": 100}
    assert seen[-1] == 100
    assert names_in(tmp_path) == ["in.jsonl", "out.jsonl"]
    store = (await client.connection()).store("the test")
    batch = await store.batch(client.settings.namespace, summary.batch_id)
    assert batch is not None
    assert (batch.status, batch.total) == ("completed", 100)


async def test_a_bad_row_stops_nobody(client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path):
    rows = [
        row("a"),
        "nonsense",
        row("a"),
        {**row("get"), "method": "GET"},
        row("nul", text="\x00"),
        row("streams", stream=True),
        row("z"),
    ]
    summary = await run(client, write(tmp_path / "in", rows), tmp_path / "out", ordered=True)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", None, "a", "get", "nul", "streams", "z"]
    codes = [line["response"]["status_code"] for line in lines]
    assert codes == [200, 400, 400, 400, 400, 400, 200]
    assert "line 5: body: text holds a NUL" in lines[4]["error"]["error"]["message"]
    assert (summary.read, summary.failed) == (7, 5)
    assert sorted(worker.ran) == ["a", "z"]


async def test_order_and_a_small_window(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    rows = [row(f"r{n}") for n in range(100)]
    await run(client, write(tmp_path / "in", rows), tmp_path / "out", ordered=True, window=3)
    lines = [json.loads(line)["custom_id"] for line in (tmp_path / "out").open()]
    assert lines == [f"r{n}" for n in range(100)]


async def send_anew(client: AsyncJobClient, worker: PlayedWorker) -> None:
    """Send what a tired worker gave back, as recovery does.

    And what a client that was killed had written and not sent.
    """
    route = wire.Route(
        namespace=client.settings.namespace,
        model=client.settings.served_model_name or "",
        priority=names.DEFAULT_PRIORITY,
    )
    queued = await client.jobs(state="queued", limit=1000)
    if ids := {*worker.left, *(job.job_id for job in queued)}:
        message = wire.JobMessage(namespace=route.namespace, sent_at=0.0, ids=tuple(ids))
        await worker.redis.lpush(route.key, wire.encode(message, route))


async def test_an_interrupted_run_goes_on_to_the_row(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    source = write(tmp_path / "in", [*(row(f"r{n}") for n in range(60)), "nonsense"])
    worker.most = 25
    partial = tmp_path / "out.partial"
    first = asyncio.create_task(
        run_batch(client, source, str(tmp_path / "out"), BatchOptions(max_tokens=77))
    )
    async with asyncio.timeout(60):
        while not (worker.left and partial.exists() and partial.stat().st_size):
            await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not (tmp_path / "out").exists()
    with partial.open("ab") as torn:
        torn.write(b'{"id": "torn", "custom')
    worker.most = None
    await send_anew(client, worker)
    task = asyncio.create_task(worker.work())
    summary = await run(client, source, tmp_path / "out", resume=True)
    task.cancel()
    assert read(tmp_path / "out").keys() == {*(f"r{n}" for n in range(60)), None}
    assert sorted(worker.ran) == sorted(f"r{n}" for n in range(60))
    assert summary.kept > 0
    bodies = [line["response"]["body"] for line in read(tmp_path / "out").values()]
    assert [body["max_tokens"] for body in bodies if "say" in body] == [77] * 60
    # Nothing is left to do, and nothing is lost by asking.
    before = (tmp_path / "out").read_text()
    summary = await run(client, source, tmp_path / "out", resume=True)
    assert (summary.kept, summary.written) == (60, 1)
    assert sorted(read(tmp_path / "out"), key=str) == sorted(
        (json.loads(line)["custom_id"] for line in before.splitlines()), key=str
    )


async def test_results_that_are_never_announced_are_found(
    client: AsyncJobClient,
    worker: PlayedWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("workers.batch._SILENCE_S", 0.2)
    worker.publishes = False
    await run(client, write(tmp_path / "in", [row("a"), row("b")]), tmp_path / "out")
    assert read(tmp_path / "out").keys() == {"a", "b"}


async def test_some_rows_are_answered_anew(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    rows = [row("fine"), row("cut", end="length"), row("bad", fail=True)]
    source = write(tmp_path / "in", rows)
    await run(client, source, tmp_path / "out")
    worker.ran.clear()
    await run(client, source, tmp_path / "out", redo="failed")
    assert worker.ran == ["bad"]
    worker.ran.clear()
    await run(client, source, tmp_path / "out", redo="truncated", max_tokens=99)
    assert worker.ran == ["cut"]
    out = read(tmp_path / "out")
    assert out["cut"]["response"]["body"]["max_tokens"] == 99
    assert out.keys() == {"fine", "cut", "bad"}


async def test_compressed_files(client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path):
    with gzip.open(tmp_path / "in.gz", "wt") as file:
        file.write(json.dumps(row("a")))
    await run(client, str(tmp_path / "in.gz"), tmp_path / "out.gz")
    with gzip.open(tmp_path / "out.gz", "rt") as out:
        assert [json.loads(line)["custom_id"] for line in out] == ["a"]
    await run(client, str(tmp_path / "in.gz"), tmp_path / "out.gz", resume=True)
    assert worker.ran == ["a"]


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text("\n  \n\n"), "is empty"),
        (lambda path: path.write_text("id,prompt\n1,hello\n"), "is not a file of one JSON object"),
        (lambda path: path.write_text('[{"custom_id": "a"}]'), "is not a file of one JSON object"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\x00"), "is not a file of one JSON"),
    ],
)
async def test_a_file_of_another_kind_is_refused(
    client: AsyncJobClient, tmp_path: Path, prepare: Any, says: str
):
    prepare(tmp_path / "in")
    with pytest.raises(InvalidFileError, match=says):
        await run(client, str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert await client.jobs() == []


async def test_a_broken_archive_is_said(client: AsyncJobClient, tmp_path: Path):
    (tmp_path / "in.gz").write_bytes(b"no gzip at all")
    with pytest.raises(InvalidFileError, match="broke off"):
        await run(client, str(tmp_path / "in.gz"), tmp_path / "out")


async def test_an_output_that_cannot_be_written_is_refused_first(
    client: AsyncJobClient, tmp_path: Path
):
    source = write(tmp_path / "in", [row("a")])
    (tmp_path / "folder").mkdir()
    for target, says in (
        (tmp_path / "nowhere" / "out", "cannot be written: its folder does not exist"),
        (tmp_path / "folder", "is a folder"),
    ):
        with pytest.raises(InvalidFileError, match=says):
            await run(client, source, target)
    with pytest.raises(InvalidFileError, match="cannot be resumed"):
        await run(client, source, "-", resume=True)
    assert await client.jobs() == []


def command(
    settings: Settings, *words: str, most_bytes: int | None = None, stderr: int | None = None
) -> Any:
    """Start the command ``batch run`` with these servers; no file may grow beyond `most_bytes`."""
    assert settings.database_url
    assert settings.redis_url
    environment = {
        **os.environ,
        "PROMPTMILL_DATABASE_URL": settings.database_url.get_secret_value(),
        "PROMPTMILL_REDIS_URL": settings.redis_url.get_secret_value(),
        "PROMPTMILL_NAMESPACE": settings.namespace,
        "PROMPTMILL_SERVED_MODEL_NAME": settings.served_model_name or "",
        "PROMPTMILL_MESSAGE_JOBS": "8",
    }
    limit = [] if most_bytes is None else ["prlimit", f"--fsize={most_bytes}"]
    return asyncio.create_subprocess_exec(
        *limit,
        *(sys.executable, "-m", "workers.cli", "batch", "run", *words),
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE if stderr is None else stderr,
    )


async def test_a_full_disk_leaves_what_is_safe(
    settings: Settings, client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    rows = [row(f"r{n}", text="x" * 1000) for n in range(40)]
    source, target = write(tmp_path / "in", rows), tmp_path / "out"
    # The limit stands for a disk that is full: writing beyond it fails.
    process = await command(settings, source, "-o", str(target), most_bytes=20_000)
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 2, said
    assert "out: cannot be written: File too large" in said.decode()
    assert f"what is in {target}.partial is safe, and --resume goes on from there" in said.decode()
    assert not target.exists()
    await send_anew(client, worker)  # what was written when the run broke off, and not sent
    summary = await run(client, source, target, resume=True)
    assert 0 < summary.kept < 20
    assert len(read(target)) == 40
    assert sorted(worker.ran) == sorted(f"r{n}" for n in range(40))


async def test_progress_is_shown_to_people_and_to_nobody_else(
    settings: Settings, worker: PlayedWorker, tmp_path: Path
):
    rows = [row(f"r{n}", temperature=0, usage={"completion_tokens": 7}) for n in range(30)]
    # Next to each other, or the first might be answered, and gone, before the second is read.
    rows[1:1] = [{**rows[0], "custom_id": "again"}]
    rows.append(row("bad", fail=True))
    source, target = write(tmp_path / "in", rows), str(tmp_path / "out")
    shown, terminal = os.openpty()
    process = await command(settings, source, "-o", target, stderr=terminal)
    os.close(terminal)
    read_all = asyncio.create_task(asyncio.to_thread(_read_terminal, shown))
    async with asyncio.timeout(60):
        await process.communicate()
        screen = await read_all
    assert process.returncode == 1
    for words in ("32/32", "rows/s", "tokens/s", "3% from cache", "1 failed", "0:00:00"):
        assert words in screen, screen[-2000:]
    process = await command(settings, source, "-o", target, "--ordered")
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    hint, line = said.decode().splitlines()
    assert "no worker is known to run" in hint  # for the one that is played says nothing of itself
    assert line.startswith("32 rows in ")
    assert "217 tokens, 3% from cache, which saved 7 tokens" in line
    assert line.endswith("1 failed")


async def test_a_run_that_begins_an_interrupted_one_anew_says_so(
    settings: Settings, worker: PlayedWorker, tmp_path: Path
):
    source, target = write(tmp_path / "in", [row("r0")]), tmp_path / "out"
    (tmp_path / "out.partial").write_text('{"custom_id": "before"}\n')
    process = await command(settings, source, "-o", str(target))
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 0, said
    assert "out.partial of a run that was interrupted is begun anew" in said.decode()
    assert read(target).keys() == {"r0"}
    assert worker.ran == ["r0"]


def _read_terminal(shown: int) -> str:
    parts = []
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(shown, 65536):
            parts.append(part)
    os.close(shown)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", b"".join(parts).decode())


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
async def test_a_killed_run_goes_on_to_the_row(
    settings: Settings,
    client: AsyncJobClient,
    worker: PlayedWorker,
    tmp_path: Path,
    stop: signal.Signals,
):
    source, target = write(tmp_path / "in", [row(f"r{n}") for n in range(80)]), tmp_path / "out"
    worker.most = 30
    process = await command(settings, source, "-o", str(target))
    async with asyncio.timeout(60):
        while len(worker.ran) < 30 or not (tmp_path / "out.partial").exists():
            await asyncio.sleep(0.01)
    process.send_signal(stop)
    _, said = await process.communicate()
    if stop == signal.SIGINT:
        assert f"what is in {target}.partial is safe, and --resume goes on" in said.decode()
        assert process.returncode == 130
    assert not target.exists()
    async with asyncio.timeout(60):
        while not worker.left:  # told now that it may go on, it would not give back the rest
            await asyncio.sleep(0.01)
    worker.most = None
    again = asyncio.create_task(worker.work())
    try:
        await send_anew(client, worker)
        summary = await run(client, source, target, resume=True)
    finally:
        again.cancel()
    assert read(target).keys() == {f"r{n}" for n in range(80)}
    assert sorted(worker.ran) == sorted(f"r{n}" for n in range(80))
    assert summary.kept + summary.written == 80


async def test_rows_that_ask_the_same_are_one_job(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    def asks(name: str, **body: Any) -> dict[str, Any]:
        return {**row(name), "body": {"say": "same", **body}}

    rows = [asks(f"greedy{n}", temperature=0) for n in range(5)]
    rows += [asks(f"seeded{n}", seed=7) for n in range(3)]
    rows += [asks(f"sampled{n}", temperature=1) for n in range(2)]
    source = write(tmp_path / "in", rows)
    summary = await run(client, source, tmp_path / "out", ordered=True)
    out = read(tmp_path / "out")
    assert list(out) == [request["custom_id"] for request in rows]
    assert len(worker.ran) == 4  # one greedy, one seeded, and each of the sampled
    assert summary.provenance == {"generated": 4, "coalesced": 6}
    assert summary.cached_share == 0.6
    assert orjson.loads(orjson.dumps(summary.summary()))["provenance"]["coalesced"] == 6
    assert out["greedy3"]["promptmill"]["provenance"] == "coalesced"
    assert len({out[f"greedy{n}"]["promptmill"]["job_id"] for n in range(5)}) == 1
    worker.ran.clear()
    await run(client, source, tmp_path / "off", job={"reuse": "off"})
    assert len(worker.ran) == 10
    # Every line has an id of its own.
    assert len({line["id"] for line in out.values()}) == 10
    # All rows count, and what the jobs know of is not passed off as all of them.
    batch = await describe(client, summary.batch_id)
    assert batch["request_counts"] == {"total": 10, "completed": 10, "failed": 0}
    found = await collect(client, summary.batch_id, str(tmp_path / "later"))
    assert not found["complete"]
    assert not (tmp_path / "later").exists()
    assert len(read(tmp_path / "later.partial")) == 4


async def test_rows_that_begin_alike_run_next_to_each_other(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    def asks(document: int, question: int) -> dict[str, Any]:
        turns = [
            {"role": "system", "content": f"Document {document}: " + "word " * 300},
            {"role": "user", "content": f"Question {question}?"},
        ]
        return {
            **row(f"{document}-{question}"),
            "body": {"say": f"{document}-{question}", "messages": turns},
        }

    rows = [asks(document, question) for question in range(10) for document in range(4)]
    await run(client, write(tmp_path / "in", rows), tmp_path / "out")
    documents = [name.split("-")[0] for name in worker.ran]
    changes = sum(here != there for here, there in pairwise(documents))
    # Jobs of one message are claimed together, in no order of ours; between messages it holds.
    assert changes < 20, documents
    worker.ran.clear()
    # Nor does a small window, which holds less than what belongs together, stop anything.
    await run(client, write(tmp_path / "in", rows), tmp_path / "few", ordered=True, window=3)
    assert list(read(tmp_path / "few")) == [request["custom_id"] for request in rows]


async def test_failed_rows_may_have_a_file_of_their_own(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    source = write(tmp_path / "in", [row("a"), row("bad", fail=True), "nonsense", row("b")])
    out, wrong = tmp_path / "out.gz", tmp_path / "wrong"
    await run(client, source, out, errors=str(wrong))
    with gzip.open(out, "rt") as lines:
        assert {json.loads(line)["custom_id"] for line in lines} == {"a", "b"}
    assert read(wrong).keys() == {"bad", None}
    worker.ran.clear()
    await run(client, source, out, errors=str(wrong), redo="failed")
    assert worker.ran == ["bad"]
    assert names_in(tmp_path) == ["in", "out.gz", "wrong"]
    # Without a failure there is no such file, nor one of before.
    await run(client, write(tmp_path / "in", [row("a")]), out, errors=str(wrong))
    assert names_in(tmp_path) == ["in", "out.gz"]


async def test_a_row_that_is_written_now_is_answered_now(
    settings: Settings, worker: PlayedWorker, tmp_path: Path
):
    process = await command(settings, "-", "-o", "-")
    lines: list[bytes] = []
    try:
        async with asyncio.timeout(60):
            for name in ("first", "second"):
                process.stdin.write(json.dumps(row(name)).encode() + b"\n")
                # Not only answered: whoever reads along has the answer.
                lines.append(await process.stdout.readline())
            process.stdin.close()
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert [json.loads(line)["custom_id"] for line in lines] == ["first", "second"]
    assert out == b""


async def test_zstandard_in_and_out(client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path):
    # Two frames one after the other, as from appending to a file.
    lines = [json.dumps(row(name)).encode() + b"\n" for name in "ab"]
    (tmp_path / "in.zst").write_bytes(b"".join(map(zstandard.compress, lines)))
    await run(client, str(tmp_path / "in.zst"), tmp_path / "out.zst")
    with zstandard.open(tmp_path / "out.zst", "rt") as out:
        assert {json.loads(line)["custom_id"] for line in out.read().splitlines()} == {"a", "b"}
    await run(client, str(tmp_path / "in.zst"), tmp_path / "out.zst", resume=True)
    assert sorted(worker.ran) == ["a", "b"]


@pytest.mark.parametrize("ending", [".zst", ".gz"])
async def test_an_archive_that_was_cut_short_is_not_passed_off_as_whole(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path, ending: str
):
    plain = b"".join(json.dumps(row(uuid4().hex)).encode() + b"\n" for _ in range(300))
    packed = zstandard.compress(plain) if ending == ".zst" else gzip.compress(plain)
    source = tmp_path / f"in{ending}"
    source.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InvalidFileError, match="broke off"):
        await run(client, str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source.write_bytes(packed[:4] + b"?" * 1000)
    with pytest.raises(InvalidFileError, match="broke off"):
        await run(client, str(source), tmp_path / "out")


async def test_a_file_that_breaks_off_is_no_batch_that_completes(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    plain = b"".join(json.dumps(row(uuid4().hex)).encode() + b"\n" for _ in range(3000))
    (tmp_path / "in.gz").write_bytes(gzip.compress(plain)[:-2000])
    with pytest.raises(InvalidFileError, match="broke off"):
        await submit_batch(client, str(tmp_path / "in.gz"))
    (batch,) = await list_batches(client)
    assert batch["status"] == "failed"
    assert batch["failed_at"] is not None
    batch_id = UUID(batch["id"])
    assert (await wait_until_over(client, batch_id))["status"] == "failed"
    await collect(client, batch_id, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    # Nor does it complete when the rest of it is cancelled.
    assert (await cancel_batch(client, batch_id))["status"] == "failed"


async def test_an_interrupted_submission_is_no_batch_that_completes(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write(tmp_path / "in", [row(f"r{n}") for n in range(100)])
    groups: list[int] = []
    stuck = asyncio.Event()
    submit_specs = client.submit_specs

    async def once(specs: Any, **named: Any) -> Any:
        groups.append(len(specs))
        if len(groups) > 1:
            stuck.set()
            await asyncio.Event().wait()
        return await submit_specs(specs, **named)

    monkeypatch.setattr(client, "submit_specs", once)
    submission = asyncio.create_task(submit_batch(client, source))
    await asyncio.wait_for(stuck.wait(), 60)
    submission.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submission
    (batch,) = await list_batches(client)
    assert batch["status"] == "failed"


async def test_two_runs_do_not_share_an_output(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    source = write(tmp_path / "in", [row("a")])
    worker.most = 0
    first = asyncio.create_task(run(client, source, tmp_path / "out"))
    async with asyncio.timeout(20):
        while "out.partial" not in names_in(tmp_path):
            await asyncio.sleep(0.01)
    with pytest.raises(InvalidFileError, match="another run is writing"):
        await run(client, source, tmp_path / "out")
    first.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await first
