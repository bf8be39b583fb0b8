"""What ``promptmill top`` shows and does, over real servers; the worker is played."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from uuid import uuid4

import orjson
import pytest

from schema import names
from schema.errors import ConfigurationError
from schema.jobs import JobError, JobResult, JobState
from tests.integration.builders import admit, spec
from workers import registry
from workers.aio_client import AsyncJobClient
from workers.cli.top import _watch, summary
from workers.cli.top_view import JobScreen, TopView
from workers.local import LocalStack
from workers.overview import Overview, Watcher
from workers.queue_marks import shine
from workers.settings import load_settings
from workers.store.jobs import JobStore
from workers.store.records import Outcome

SAID = {
    "models": ["m"],
    "device": "gpu0",
    "running": 3,
    "slots": 8,
    "oldest_sent_at": None,
    "jobs": {"done": 10, "failed": 2},
    "tokens": 100,
    "memory": {"worker": 2_000_000_000, "engine": 1_000_000_000},
    "lag_s": 0.004,
    "engine": {"generated": 1, "coalesced": 1, "hits": {"exact/memory": 2}},
}


@pytest.fixture
async def client(stack: LocalStack) -> AsyncIterator[AsyncJobClient]:
    settings = load_settings(data_dir=stack.data_dir, namespace=f"n{uuid4().hex[:8]}")
    async with AsyncJobClient(settings) as client:
        yield client


@pytest.fixture
async def worker(client: AsyncJobClient) -> AsyncIterator[str]:
    name = f"m@host:gpu0:{uuid4().hex[:6]}"
    redis = (await client.connection()).redis
    await registry.announce(redis, ["m"])
    await shine(redis, name, SAID)
    await redis.persist(names.worker_key(name))  # else its word counts for ten seconds
    yield name
    await redis.delete(names.worker_key(name))


async def failed_and_running(client: AsyncJobClient) -> tuple[str, str]:
    """A job that failed, and one that runs."""
    database = (await client.connection()).database
    assert database is not None
    store = JobStore(database)
    jobs = [spec(namespace=client.settings.namespace) for _ in range(2)]
    await admit(store, *jobs)
    claim = await store.claim([job.id for job in jobs], owner="w", lease_s=600)
    bad = claim.jobs[0]
    error = JobError(type="EngineFailedError", message="the card has fallen off the bus")
    result = JobResult(
        job_id=bad.id,
        namespace=bad.namespace,
        status=JobState.FAILED,
        token=bad.token,
        error=error,
    )
    await store.finish([Outcome(job_id=bad.id, token=bad.token, result=result)])
    return str(bad.id), str(claim.jobs[1].id)


def named(jobs: Iterable[object]) -> list[str]:
    return [str(job.job_id) for job in jobs]  # type: ignore[attr-defined]


async def test_a_look_has_workers_queues_and_jobs(client: AsyncJobClient, worker: str) -> None:
    bad, running = await failed_and_running(client)
    watcher = Watcher(client)
    seen = await watcher.look()
    (mine,) = [one for one in seen.workers if one.name == worker]
    assert (mine.running, mine.slots, mine.ended, mine.reused) == (3, 8, 12, 0.75)
    assert (mine.memory_bytes, mine.jobs_per_s) == (3_000_000_000, None)
    assert mine.answers == {"generated": 1, "coalesced": 1, "exact": 2}
    assert "m" in {queue.model for queue in seen.queues}
    assert named(seen.failed) == [bad]
    assert named(seen.slow) == [running]
    public = seen.public()
    assert public["failed"][0]["error"]["message"] == "the card has fallen off the bus"
    (told,) = [one for one in public["workers"] if one["name"] == worker]
    assert (told["device"], told["reused"]) == ("gpu0", 0.75)
    assert 0 < public["reused"] < 1

    # The rate is what came between two looks.
    redis = (await client.connection()).redis
    await shine(redis, worker, {**SAID, "jobs": {"done": 20, "failed": 2}, "tokens": 600})
    (mine,) = [one for one in (await watcher.look()).workers if one.name == worker]
    assert mine.jobs_per_s is not None
    assert mine.jobs_per_s > 0
    assert mine.tokens_per_s == pytest.approx(50 * mine.jobs_per_s)

    # Workers speak less often than one looks: until the next word the rate stands.
    (again,) = [one for one in (await watcher.look()).workers if one.name == worker]
    assert again.jobs_per_s == mine.jobs_per_s


async def test_a_job_that_fails_during_the_look_is_shown_once(
    client: AsyncJobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, running = await failed_and_running(client)
    states = await client.jobs()

    async def both(**_asked: object) -> list[object]:
        return list(states)

    monkeypatch.setattr(client, "jobs", both)
    seen = await Watcher(client).look()
    assert sorted([*named(seen.slow), *named(seen.failed)]) == sorted([bad, running])


async def test_keys_look_into_cancel_and_retry(client: AsyncJobClient, worker: str) -> None:
    bad, running = await failed_and_running(client)
    app = TopView(client, every_s=3600)
    async with app.run_test(size=(160, 48)) as pilot:
        await pilot.pause()
        jobs = app.query_one("#jobs")
        assert app.query_one("#workers").row_count >= 1  # type: ignore[attr-defined]
        assert jobs.row_count == 2  # type: ignore[attr-defined]

        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, JobScreen))
        assert running in app.screen._text  # type: ignore[attr-defined]
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, JobScreen))

        await pilot.press("c")
        await until(pilot, lambda: told(app) == ["cancelled"])
        await pilot.press("down", "r")
        async with asyncio.timeout(30):
            while (await client.status(bad)).state is not JobState.QUEUED:
                await pilot.pause(0.05)
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)


async def test_a_narrow_terminal_shows_what_matters(client: AsyncJobClient, worker: str) -> None:
    bad, running = await failed_and_running(client)
    redis = (await client.connection()).redis
    for name in await redis.keys(names.worker_key("*")):  # of other tests
        if worker not in name.decode():
            await redis.delete(name)
    app = TopView(client, every_s=3600)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        await shine(redis, worker, {**SAID, "jobs": {"done": 20, "failed": 2}, "tokens": 600})
        await app.look()
        await pilot.pause()
        lines = [strip.text for strip in app.screen._compositor.render_strips()]
    shown = " ".join(" ".join(lines).split())
    for words in ("1 worker ", "3 of 8 slots", "reused 75%", "exact 50%, coalesced 25%"):
        assert words in shown
    for column in ("device", "jobs/s", "tokens/s", "reused", "queued", "oldest", "since", "error"):
        assert column in shown
    assert "gpu0" in shown
    assert "host:" in shown
    for words in (bad, running, "the card has fallen", "enter", "look into", "cancel", "quit"):
        assert words in shown


def test_a_share_and_a_rate_that_nobody_knows_are_left_out() -> None:
    seen = Overview(at=datetime.now(UTC), workers=(), queues=(), slow=(), failed=())
    assert summary(seen).split("   ")[1:] == ["0 workers", "0 of 0 slots"]


async def test_keys_act_on_the_job_that_was_chosen(client: AsyncJobClient, worker: str) -> None:
    bad, _ = await failed_and_running(client)
    app = TopView(client, every_s=3600)
    async with app.run_test(size=(160, 48)) as pilot:
        await pilot.press("down")
        await until(pilot, lambda: str(app._under_cursor()) == bad)

        # Others come in before it: the cursor goes with its job.
        other, _ = await failed_and_running(client)
        await app.look()
        assert str(app._under_cursor()) == bad

        # It leaves the list: what the cursor falls on is touched at the second press only.
        await client.retry(bad)
        await app.look()
        assert str(app._under_cursor()) == other
        await pilot.press("r")
        await until(pilot, lambda: any("left the list" in text for text in told(app)))
        assert (await client.status(other)).state is JobState.FAILED
        await pilot.press("r")
        async with asyncio.timeout(30):
            while (await client.status(other)).state is not JobState.QUEUED:
                await pilot.pause(0.05)


async def test_one_look_is_printed_for_scripts(
    client: AsyncJobClient, worker: str, stack: LocalStack
) -> None:
    bad, running = await failed_and_running(client)
    told_json = orjson.loads(await printed(client, stack, "--json"))
    assert named_in(told_json["failed"]) == [bad]
    assert named_in(told_json["slow"]) == [running]
    assert worker in {one["name"] for one in told_json["workers"]}
    # A pipe is no terminal: tables, with or without the option.
    for options in (("--once",), ()):
        text = await printed(client, stack, *options)
        assert bad in text
        assert "gpu0" in text


def test_without_textual_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "workers.cli.top_view", None)
    with pytest.raises(ConfigurationError, match=r"promptmill\[top\]"):
        _watch(load_settings(), 2.0, None)


async def printed(client: AsyncJobClient, stack: LocalStack, *options: str) -> str:
    """What ``promptmill top`` writes in a process of its own."""
    env = {
        **os.environ,
        "PROMPTMILL_DATA_DIR": str(stack.data_dir),
        "PROMPTMILL_NAMESPACE": client.settings.namespace,
        "COLUMNS": "200",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "workers.cli",
        "top",
        *options,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode()


def named_in(jobs: Iterable[dict[str, object]]) -> list[object]:
    return [job["job_id"] for job in jobs]


def told(app: TopView) -> list[str]:
    return [note.message for note in app._notifications]


async def until(pilot: object, condition: object) -> None:
    async with asyncio.timeout(30):
        while not condition():  # type: ignore[operator]
            await pilot.pause(0.02)  # type: ignore[attr-defined]
