"""A worker process that holds two answers in memory, and says on its output what it forgets.

``python -m tests.integration.forgetting_worker REDIS_URL DATABASE_URL NAMESPACE DOOMED KEPT``.
All is real but the engine. It ends when its input closes.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any
from uuid import UUID

from tests.integration.builders import answer
from tests.integration.test_runtime import MODEL, PlayedEngine
from workers import logs
from workers.endpoints import Endpoints
from workers.runtime import worker_runtime
from workers.serving import ServedModel
from workers.settings import load_settings


class Forgetful(PlayedEngine):
    """Says how many answers are left; when all are gone it takes them in anew."""

    def __init__(self, namespace: str, doomed: UUID, kept: UUID) -> None:
        super().__init__()
        self._held = (
            answer(id=doomed, namespace=namespace, fingerprint=b"d" * 32),
            answer(id=kept, namespace=namespace, fingerprint=b"k" * 32),
        )

    def forget(self, **of: Any) -> int:
        forgotten = super().forget(**of)
        print("left", len(self.memory), flush=True)
        if not of:
            for each in self._held:
                self.memory.put(each)
        return forgotten


async def main(redis_url: str, database_url: str, namespace: str, doomed: str, kept: str) -> None:
    """Work until the input closes."""
    logs.configure(level="WARNING", form="json")
    engine = Forgetful(namespace, UUID(doomed), UUID(kept))

    async def start_engine(*_: Any) -> tuple[Any, Any]:
        return engine, None

    async with worker_runtime(
        load_settings(),
        Endpoints(redis_url=redis_url, database_url=database_url),
        ServedModel(name=MODEL, path=MODEL),
        start_engine=start_engine,
    ):
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
