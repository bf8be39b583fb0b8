"""Prints docs/img/top.svg: ``promptmill top`` over two workers with the real model and work to do.

``python tools/top_picture.py > docs/img/top.svg``; it takes some minutes, on a stack of its own.
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
from typing import TYPE_CHECKING, Any

from schema.errors import PromptmillError
from workers import AsyncJobClient
from workers.cli.top import summary
from workers.cli.top_view import TopView
from workers.devices import Fleet
from workers.pinning import share_cpu
from workers.settings import load_settings

if TYPE_CHECKING:
    from workers.overview import Overview

_SIZE = (132, 24)
_READY_S = 900.0
_LOOK_S = 2.0
_MOST_S = 240.0
_SHARES = (0.15, 0.75)  # of answers that are reused, in a picture that tells something
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
_SAID = """\
    <title>promptmill top</title>
    <desc>Two workers with their devices, jobs, rates, shares of reused answers and memory, the \
queue of their model, and the jobs that run longest or failed, each of which can be looked into, \
cancelled or run once more.</desc>
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
        """Whether there are rates, a queue, reused answers and jobs that failed to be seen."""
        seen = self.seen
        return (
            seen is not None
            and all(w.jobs_per_s and w.tokens_per_s and w.running for w in seen.workers)
            and _SHARES[0] <= (seen.reused or 0) <= _SHARES[1]
            and any(queue.queued for queue in seen.queues)
            and len(seen.failed) > 1
        )


#: Jobs that cannot be answered, each for a reason of its own.
_FAILING: tuple[dict[str, Any], ...] = (
    {"prompt": "word " * 9000},
    {"prompt": "Go on for ever:", "sampling": {"max_tokens": 100_000}},
    {"prompt": "What else could it be?", "sampling": {"max_tokens": 8, "logprobs": 500}},
)


async def _work(client: AsyncJobClient) -> None:
    """Keep the workers busy: jobs of which half repeat others, and some that must fail."""
    for job in _FAILING:
        await client.submit(**job)
    for number in itertools.count():
        asked = [
            {
                "messages": [{"role": "user", "content": f"What is {thing} known for? ({part})"}],
                "sampling": {"max_tokens": 24 * (1 + part % 5)},
            }
            for part in range(8 * number, 8 * number + 16)  # half of them were in the round before
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
                if view.seen is not None:
                    print(summary(view.seen), len(view.seen.failed), file=sys.stderr)
                if working.done():
                    working.result()
            return view.export_screenshot(title="promptmill top")
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def _main(folder: Path) -> str:
    settings = load_settings(data_dir=folder / "data", max_running=16)
    async with AsyncJobClient(settings) as client:
        await client.connection()
        devices = share_cpu([1, 1])
        fleet = Fleet(settings, devices, on_event=lambda text: print(text, file=sys.stderr))
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
    return re.sub(rf"\b{re.escape(socket.gethostname())}:(?=\d)", "node7:", whole)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as at:
        Path(at).chmod(0o755)  # the embedded servers may run as another user
        drawn = asyncio.run(_main(Path(at)))
    print(_finished(drawn), end="")
