"""Every recipe in examples/, run as its reader would; the engine is a scripted stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from tests.acceptance.faults.scripted_worker import MODEL, SLOWEST, scripted_answer
from tests.acceptance.faults.workers_of_a_run import ScriptedWorkers
from workers.aio_client import AsyncJobClient
from workers.local import LocalStack
from workers.settings import load_settings
from workers.store.schema_upgrade import upgrade

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WAIT_S = 120.0
RECIPES = {"nightly.sh", "webhook.py", "celery_steps.py", "plain_producer.py"}


@pytest.fixture(scope="module")
async def servers(
    stack: LocalStack, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, str]]:
    """One scripted worker on the embedded stack; the environment of its clients."""
    folder = tmp_path_factory.mktemp("recipes")
    upgrade(stack.database_url)
    environment = {
        "PROMPTMILL_DATABASE_URL": stack.database_url,
        "PROMPTMILL_REDIS_URL": stack.redis_url,
        "PROMPTMILL_SERVED_MODEL_NAME": MODEL,
        "PROMPTMILL_NAMESPACE": f"n{uuid4().hex[:12]}",
        "PYTHONPATH": str(ROOT),
        SLOWEST: "0.02",
    }
    # `promptmill` is on the PATH of whoever has installed it.
    command = folder / "promptmill"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m workers.cli "$@"\n')
    command.chmod(0o755)
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    workers = ScriptedWorkers(count=1, environment=environment, log=folder / "log")
    await workers.start()
    yield environment
    await workers.stop()


async def run(servers: dict[str, str], *words: str | Path) -> tuple[int, str, str]:
    """Run a command to its end."""
    process = await start(servers, *words)
    try:
        async with asyncio.timeout(WAIT_S):
            out, err = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def start(servers: dict[str, str], *words: str | Path) -> asyncio.subprocess.Process:
    """Start a command."""
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *map(str, words), env={**os.environ, **servers}, cwd=ROOT, stdout=pipe, stderr=pipe
    )


def test_every_recipe_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".sh"}} == RECIPES


async def test_a_batch_from_cron(servers: dict[str, str], tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"Question {number}?"}] for number in range(20)]
    lines = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": messages},
        }
        for number, messages in enumerate(turns)
    ]
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n")
    code, _, err = await run(servers, EXAMPLES / "nightly.sh", source)
    assert code == 0, err
    answers = (tmp_path / "questions.answers.jsonl").read_text().splitlines()
    assert len(answers) == 20
    # A second night with a bad line more: what is there stays, and the exit code tells.
    source.write_text(source.read_text() + "nonsense\n")
    code, _, err = await run(servers, EXAMPLES / "nightly.sh", source)
    assert code == 1
    assert "20 kept from before" in err
    assert "some rows failed; see" in err
    (wrong,) = (tmp_path / "questions.errors.jsonl").read_text().splitlines()
    assert "line 21" in json.loads(wrong)["error"]["message"]


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A web address that fails the first time it is asked."""
    got: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.headers["Idempotency-Key"], body))
            self.send_response(503 if len(got) == 1 else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/answers", got
    server.shutdown()
    thread.join()
    server.server_close()


async def test_results_posted_to_a_web_address(
    servers: dict[str, str], receiver: tuple[str, list[tuple[str, dict[str, Any]]]]
) -> None:
    url, got = receiver
    namespace = servers["PROMPTMILL_NAMESPACE"]
    settings = load_settings(
        database_url=servers["PROMPTMILL_DATABASE_URL"],
        redis_url=servers["PROMPTMILL_REDIS_URL"],
        served_model_name=MODEL,
        namespace=namespace,
    )
    channel = f"hook-{uuid4().hex[:8]}"
    process = await start(servers, sys.executable, EXAMPLES / "webhook.py", channel, url)
    try:
        async with AsyncJobClient(settings) as client:
            jobs = await client.submit_many([f"Prompt {n}" for n in range(3)], channel=channel)
        async with asyncio.timeout(WAIT_S):
            while len(got) < 4 and process.returncode is None:
                await asyncio.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert len(got) == 4, err
    assert got[0] == got[1]  # refused once, and posted again
    assert {body["job_id"] for _, body in got} == {str(job.id) for job in jobs}
    assert {body["text"] for _, body in got} == {scripted_answer(f"Prompt {n}") for n in range(3)}


async def test_a_group_of_chains_over_our_task(servers: dict[str, str]) -> None:
    name = f"review-{uuid4().hex[:8]}"
    prompts = ["Is it good?", "Is it new?", "Is it true?"]
    words = [
        "--workdir",
        "examples",
        "-A",
        "celery_steps",
        "worker",
        "--queues",
        "reports",
        "--pool",
        "solo",
    ]
    quiet = ["--without-gossip", "--without-mingle"]
    worker = await start(servers, sys.executable, "-m", "celery", *words, *quiet)
    redis = Redis.from_url(servers["PROMPTMILL_REDIS_URL"])
    try:
        code, _, err = await run(
            servers, sys.executable, EXAMPLES / "celery_steps.py", name, *prompts
        )
        assert code == 0, err
        reports: list[list[str]] = []
        async with asyncio.timeout(WAIT_S):
            for part in range(2):
                while (found := await redis.get(f"report:{name}-{part}")) is None:
                    assert worker.returncode is None
                    await asyncio.sleep(0.05)
                reports.append(json.loads(found)["answers"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            worker.terminate()
        await worker.communicate()
        await redis.aclose()
    assert [sorted(answers) for answers in reports] == [
        sorted(map(scripted_answer, prompts[:2])),
        [scripted_answer(prompts[2])],
    ]


async def test_a_producer_with_none_of_our_code(servers: dict[str, str]) -> None:
    source = (EXAMPLES / "plain_producer.py").read_text()
    assert "workers" not in source
    assert "import schema" not in source
    prompt = "The capital of France is"
    code, out, err = await run(servers, sys.executable, EXAMPLES / "plain_producer.py", prompt)
    assert code == 0, err
    assert out.strip() == scripted_answer(prompt)
