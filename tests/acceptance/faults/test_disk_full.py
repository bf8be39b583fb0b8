"""A data folder with no room left: everybody waits, and goes on when there is room again."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from schema.errors import ServiceError
from schema.jobs import JobState
from tests.acceptance.faults.scripted_worker import MODEL, scripted_answer
from tests.acceptance.faults.workers_of_a_run import ScriptedWorkers
from workers import AsyncJobClient, Settings, local
from workers.store.schema_upgrade import upgrade

pytestmark = pytest.mark.timeout(600)
WAIT_S = 120.0
FULL_S = 8.0
_SIZE = "400m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={_SIZE},mode=755", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted by root, where that is allowed")
    yield folder
    subprocess.run([str(shutil.which("umount")), "-l", str(folder)], check=True)


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 65_536):
                pass
        except OSError:
            return


async def test_a_full_disk_costs_nothing_but_time(small_disk: Path, tmp_path: Path) -> None:
    stack = await asyncio.to_thread(local.start, small_disk / "data")
    upgrade(stack.database_url)
    values = {
        "PROMPTMILL_DATABASE_URL": stack.database_url,
        "PROMPTMILL_REDIS_URL": stack.redis_url,
    }
    workers = ScriptedWorkers(count=1, environment=values, log=tmp_path / "workers.log")
    settings = Settings(
        database_url=SecretStr(stack.database_url),
        redis_url=SecretStr(stack.redis_url),
        served_model_name=MODEL,
    )
    try:
        await workers.start()
        async with AsyncJobClient(settings) as client:
            prompts = [f"question {number}" for number in range(300)]
            jobs = await client.submit_many(prompts, reuse="off")
            ballast = small_disk / "ballast"
            await asyncio.to_thread(_fill, ballast)
            refused = 0
            end = asyncio.get_running_loop().time() + FULL_S
            while asyncio.get_running_loop().time() < end:
                try:
                    jobs += await client.submit_many(["y" * 5_000], reuse="off")
                    prompts.append("y" * 5_000)
                except ServiceError:
                    refused += 1
                await asyncio.sleep(0.05)
            assert refused
            ballast.unlink()
            results = await asyncio.gather(*(job.result(WAIT_S) for job in jobs))
        assert {result.status for result in results} == {JobState.DONE}
        assert [result.text for result in results] == [scripted_answer(each) for each in prompts]
        assert not workers.endings, (tmp_path / "workers.log").read_text()[-3000:]
    finally:
        await workers.stop()
        await asyncio.to_thread(stack.close, wait_s=30)
