"""Prints docs/img/top.svg: ``promptmill top`` over a worker with the real model and work to do.

``python tools/top_picture.py > docs/img/top.svg``; it takes a minute or two, on a stack of its own.
The host's name is replaced, for it is nobody's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import PromptmillError
from workers import AsyncJobClient
from workers.cli.top_view import TopView
from workers.devices import Device, Fleet
from workers.settings import load_settings

if TYPE_CHECKING:
    from workers.overview import Overview

_SIZE = (132, 24)
_READY_S = 900.0
_LOOK_S = 2.0
_MOST_S = 180.0
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
_SAID = """\
    <title>promptmill top</title>
    <desc>A worker with its jobs, rates and memory, the queue of its model, and the jobs that run \
longest or failed, each of which can be looked into, cancelled or run once more.</desc>
"""
_THINGS = ("the lighthouse", "sourdough bread", "a glacier", "the violin", "soap", "the compass")


class _Watched(TopView):
    """The view, which remembers what it showed last."""

    seen: Overview | None = None

    def _fill(self, seen: Overview) -> None:
        super()._fill(seen)
        self.seen = seen

    @property
    def is_telling(self) -> bool:
        """Whether there is a rate, a queue and a job that failed to be seen."""
        seen = self.seen
        return (
            seen is not None
            and any((w.jobs_per_s or 0) > 1 and (w.tokens_per_s or 0) > 1 for w in seen.workers)
            and any(queue.queued and queue.running for queue in seen.queues)
            and bool(seen.failed)
        )


async def _work(client: AsyncJobClient) -> None:
    """Keep a worker busy: jobs of which some repeat others, and one that cannot be answered."""
    await client.submit("word " * 9000)
    for number in itertools.count():
        asked = [
            {
                "messages": [{"role": "user", "content": f"What is {thing} known for? ({part})"}],
                "sampling": {"max_tokens": 48},
            }
            for part in range(number // 2, number // 2 + 16)
            for thing in _THINGS
        ]
        jobs = await client.submit_many(asked)
        with contextlib.suppress(TimeoutError, PromptmillError):
            await jobs[len(jobs) // 2].result(timeout_s=_MOST_S)


async def _picture(client: AsyncJobClient) -> str:
    working = asyncio.create_task(_work(client), name="work")
    try:
        view = _Watched(client, every_s=_LOOK_S)
        async with view.run_test(size=_SIZE) as pilot, asyncio.timeout(_MOST_S):
            while not view.is_telling:
                await pilot.pause(_LOOK_S / 4)
                if working.done():
                    working.result()
            return view.export_screenshot(title="promptmill top")
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def _main(folder: Path) -> str:
    settings = load_settings(data_dir=folder / "data", max_running=32)
    async with AsyncJobClient(settings) as client:
        await client.connection()
        fleet = Fleet(settings, [Device()], on_event=lambda text: print(text, file=sys.stderr))
        fleet.start()
        try:
            await asyncio.to_thread(fleet.wait_ready, _READY_S)
            return await _picture(client)
        finally:
            await asyncio.to_thread(fleet.stop_now)
            await asyncio.to_thread(fleet.stop)


def _finished(drawn: str) -> str:
    """Say what the picture shows, have it fetch nothing, and name no host."""
    head, line, rest = drawn.partition("<!-- Generated with Rich https://www.textualize.io -->\n")
    if not line:
        raise RuntimeError("the picture begins otherwise than it did")
    whole = head.rstrip(" ") + _SAID + _FONT.sub("", rest)
    return whole.replace(f"@{socket.gethostname()}:", "@host:")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as at:
        Path(at).chmod(0o755)  # the embedded servers may run as another user
        drawn = asyncio.run(_main(Path(at)))
    print(_finished(drawn), end="")
