"""The command against real servers, without a worker."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import openai
import pytest
from redis.asyncio import Redis

from schema import names, wire
from schema.jobs import Completion, JobResult, JobState
from workers.channel import ResultChannel
from workers.cli import main
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.store.records import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from workers.local import LocalStack


class Command:
    """Runs the command and returns what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str], model: str, urls: tuple[str, str]):
        self._capfd = capfd
        self.model = model
        self._database_url, self._redis_url = urls

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run it."""
        assert main(list(words)) == code
        self.err = ""
        heard = self._capfd.readouterr()
        self.err = heard.err
        return heard.out.strip()

    def json(self, *words: str, code: int = 0) -> Any:
        """Run it with ``--json``."""
        return json.loads(self(*words, "--json", code=code))

    def work(self) -> None:
        """Answer all that waits."""
        asyncio.run(self._work())

    async def _work(self) -> None:
        redis, database = Redis.from_url(self._redis_url), Database(self._database_url)
        store = JobStore(database)
        key = names.priority_list(names.queue(self.model), names.DEFAULT_PRIORITY)
        while (item := await redis.rpop(key)) is not None:
            assert isinstance(item, (str, bytes))
            message = wire.decode(json.loads(item)["headers"][names.JOBS_HEADER])
            claim = await store.claim(message.ids, owner="played", lease_s=30)
            for job in claim.jobs:
                failed = "fail" in json.dumps(job.request)
                result = JobResult(
                    job_id=job.id,
                    namespace=job.namespace,
                    status=JobState.FAILED if failed else JobState.DONE,
                    token=job.token,
                    custom_id=job.custom_id,
                    text="because",
                    outputs=[Completion(text="because")],
                    body={"choices": []},
                    metadata={"provenance": "generated"},
                    error={"type": "EngineFailedError", "message": "broke"} if failed else None,
                )
                await store.finish([Outcome(job_id=job.id, token=job.token, result=result)])
                await ResultChannel(redis).publish([(job.channel, result)])
        await database.aclose()
        await redis.aclose()


@pytest.fixture
def command(
    stack: LocalStack,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    """The subject, with a database, a tenant and a model of this test's own."""
    model = f"m{uuid4().hex}"
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", database_url)
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", stack.redis_url)
    monkeypatch.setenv("PROMPTMILL_NAMESPACE", f"n{uuid4().hex}")
    monkeypatch.setenv("PROMPTMILL_SERVED_MODEL_NAME", model)
    return Command(capfd, model, (database_url, stack.redis_url))


def test_a_prompt_from_submission_to_answer(command: Command):
    job = command("submit", "Why is the sky blue?", "--system", "Be brief.", "--max-tokens", "9")
    assert [row["job_id"] for row in command.json("jobs", "list", "--state", "queued")] == [job]
    assert job in command("jobs", "list")
    request = command.json("jobs", "show", job)["request"]["body"]
    assert [turn["role"] for turn in request["messages"]] == ["system", "user"]
    assert request["max_tokens"] == 9
    command.work()
    shown = command.json("jobs", "show", job)
    assert shown["status"]["state"] == "done"
    assert shown["result"]["text"] == "because"
    # Under a key it is the same job again, and its answer is there.
    words = ("submit", "x", "--completion", "--key", "k")
    again = command(*words)
    command.work()
    assert command(*words, "--wait") == "because"
    assert command.json(*words, "--wait")["job_id"] == again
    assert command(*words, "--stream") == "because"


def test_waiting_has_an_end(command: Command):
    command("submit", "Why?", "--wait", "--timeout", "0.1", code=124)
    assert "it is queued; it goes on" in command.err
    assert "no worker is known to run" in command.err


def test_a_failed_job_is_code_1_and_can_be_retried(command: Command):
    job = command("submit", "fail", "--key", "k")
    command.work()
    command("submit", "fail", "--key", "k", "--wait", code=1)
    assert "failed: EngineFailedError: broke" in command.err
    assert command.json("jobs", "retry", job) == [job]
    assert command.json("jobs", "cancel", job) == {job: True}
    assert command.json("jobs", "show", job)["status"]["state"] == "cancelled"
    command("jobs", "show", str(uuid4()), code=2)


def test_dead_jobs_are_listed_whole_and_run_once_more_together(command: Command, tmp_path: Path):
    batch = command("batch", "submit", batch_file(tmp_path / "in", ["fail", "good", "fail too"]))
    alone = command("submit", "fail", "--completion")
    command.work()
    dead = {row["job_id"]: row for row in command.json("jobs", "list", "--state", "failed")}
    of_batch = {job for job, row in dead.items() if row["batch_id"] == batch}
    assert len(of_batch) == 2
    assert set(dead) == {*of_batch, alone}
    for job in of_batch:
        shown = command.json("jobs", "show", job)
        assert shown["request"]["body"]["say"] == shown["status"]["custom_id"]
        assert shown["result"]["error"] == shown["status"]["error"] == dead[job]["error"]
        assert (shown["status"]["error"]["type"], shown["status"]["error"]["message"]) == (
            "EngineFailedError", "broke",
        )  # fmt: skip
    assert set(command.json("jobs", "retry", "--batch", batch, "--state", "failed")) == of_batch
    assert command.json("jobs", "retry", "--batch", batch, "--state", "failed") == []
    command.work()
    assert set(command.json("jobs", "retry", *dead)) == set(dead)
    assert command.json("jobs", "list", "--state", "failed") == []


def batch_file(path: Path, names_: list[str]) -> str:
    """Write a batch file."""
    row = {"method": "POST", "url": "/v1/chat/completions"}
    lines = [json.dumps({"custom_id": name, **row, "body": {"say": name}}) for name in names_]
    path.write_text("\n".join([*lines, "nonsense"]))
    return str(path)


def test_a_batch_that_nobody_waits_for(command: Command, tmp_path: Path):
    source = batch_file(tmp_path / "in", ["a", "b", "fail"])
    batch = command("batch", "submit", source)
    assert command.json("batch", "status", batch)["status"] == "in_progress"
    command("batch", "results", batch, "-o", str(tmp_path / "out"), code=1)
    assert "1 of 4 rows are over; what there is stands in" in command.err
    assert not (tmp_path / "out").exists()
    command.work()
    found = command.json("batch", "status", batch)
    assert found["status"] == "completed"
    assert found["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    assert found["endpoint"] == "/v1/chat/completions"
    assert found["completed_at"] >= found["created_at"]
    assert found["errors"]["data"][0]["line"] == 4
    command("batch", "results", batch, "-o", str(tmp_path / "out"), "--wait")
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b", "fail", None]
    apart = ("--errors", str(tmp_path / "wrong"))
    command("batch", "results", batch, "-o", str(tmp_path / "out"), *apart)
    rows = {name: (tmp_path / name).read_text().splitlines() for name in ("out", "wrong")}
    assert {json.loads(line)["custom_id"] for line in rows["out"]} == {"a", "b"}
    assert {json.loads(line)["custom_id"] for line in rows["wrong"]} == {"fail", None}
    printed = command("batch", "results", batch)
    assert len(printed.splitlines()) == 4
    assert [row["id"] for row in command.json("batch", "list")] == [batch]
    assert batch in command("batch", "list")
    command("batch", "status", str(uuid4()), code=2)


def test_a_batch_is_cancelled(command: Command, tmp_path: Path):
    batch = command("batch", "submit", batch_file(tmp_path / "in", ["a", "b"]))
    found = command.json("batch", "cancel", batch)
    assert found["status"] == "cancelled"
    assert found["states"]["cancelled"] == 2
    assert found["cancelled_at"] >= found["cancelling_at"] >= found["created_at"]


def test_what_is_over_is_not_cancelled(command: Command, tmp_path: Path):
    batch = command("batch", "submit", batch_file(tmp_path / "in", ["a"]))
    command.work()
    for _ in range(2):
        assert command.json("batch", "cancel", batch)["status"] == "completed"
    command("batch", "results", batch, "-o", str(tmp_path / "out"))
    assert len((tmp_path / "out").read_text().splitlines()) == 2


def test_rows_that_are_run_once_more_make_a_batch_unfinished_again(
    command: Command, tmp_path: Path
):
    batch = command("batch", "submit", batch_file(tmp_path / "in", ["a", "fail"]))
    command.work()
    before = command.json("batch", "status", batch)
    assert before["status"] == "completed"
    command("jobs", "retry", "--batch", batch)
    found = command.json("batch", "status", batch)
    assert (found["status"], found["completed_at"]) == ("in_progress", None)
    assert found["request_counts"] == {"total": 3, "completed": 1, "failed": 1}
    command("batch", "results", batch, "-o", str(tmp_path / "out"), code=1)
    assert "2 of 3 rows are over" in command.err
    assert not (tmp_path / "out").exists()
    command.work()
    command("batch", "results", batch, "-o", str(tmp_path / "out"))
    assert len((tmp_path / "out").read_text().splitlines()) == 3


def test_all_rows_of_a_batch_are_run_once_more(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("workers.aio_client._RETRY_AT_ONCE", 2)
    rows = [f"fail {n}" for n in range(5)]
    batch = command("batch", "submit", batch_file(tmp_path / "in", rows))
    command.work()
    assert len(command.json("jobs", "retry", "--batch", batch, "--state", "failed")) == 5
    assert command.json("batch", "status", batch)["states"]["queued"] == 5


def test_a_batch_is_shown_as_openai_shows_it(command: Command, tmp_path: Path):
    found = command.json("batch", "submit", batch_file(tmp_path / "in", ["a"]))
    assert openai.types.Batch.model_validate(found).request_counts
    assert set(openai.types.Batch.model_fields) - {"model", "usage"} <= set(found)


def test_the_cache_is_looked_at_and_emptied(command: Command):
    assert command.json("cache", "stats")["live"] == 0
    assert "tokens saved" in command("cache", "stats")
    assert command.json("cache", "invalidate", "--all") == {"forgotten": 0}
    command("cache", "invalidate", code=2)
    assert "say which answers to forget" in command.err
    command("cache", "report-bad", str(uuid4()), code=2)


def test_the_database_is_at_its_newest(command: Command):
    found = command.json("db", "upgrade")
    assert found["before"] == found["after"]
    command("db", "upgrade")
    assert "at revision" in command.err
