"""`Publisher`: puts committed outcomes on their channels, in company, and notes that it did."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from workers.store.records import Delivery

if TYPE_CHECKING:
    from workers.channel import ResultChannel
    from workers.store.jobs import JobStore

_log = structlog.get_logger(__name__)


class Publisher:
    """Publishes outcomes of many callers together.

    While one group is on its way the next one gathers. What cannot be published now stays
    committed and unpublished; recovery publishes it.

    Args:
        channel: The result channels.
        jobs: Notes what was published.
        ttl_s: Seconds a channel is kept after its last result.
        maxlen: Results a channel keeps, approximately.
        max_group: Outcomes one trip may hold.
    """

    def __init__(
        self,
        channel: ResultChannel,
        jobs: JobStore,
        *,
        ttl_s: float,
        maxlen: int = 1_000_000,
        max_group: int = 512,
    ) -> None:
        self._channel = channel
        self._jobs = jobs
        self._ttl_s = ttl_s
        self._maxlen = maxlen
        self._max_group = max_group
        self._waiting: deque[tuple[Delivery, asyncio.Future[None]]] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Publish committed outcomes, in company; return when they are on their channels.

        Args:
            deliveries: Committed already.

        Raises:
            BrokerUnavailableError: Redis cannot be used now; recovery publishes them.
        """
        if not deliveries:
            return
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="promptmill-publisher")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in deliveries]
        self._waiting.extend(zip(deliveries, futures, strict=True))
        self._wake.set()
        await asyncio.gather(*futures)

    async def send(self, deliveries: Sequence[Delivery]) -> str | None:
        """Publish committed outcomes in one trip, and leave it to the caller to note that.

        Args:
            deliveries: Committed already.

        Returns:
            The epoch that Redis bore when it had taken them.

        Raises:
            BrokerUnavailableError: Redis cannot be used now.
        """
        epoch = await self._channel.publish(
            [(delivery.channel, delivery.result) for delivery in deliveries],
            maxlen=self._maxlen,
            ttl_s=self._ttl_s,
        )
        for delivery in deliveries:
            if delivery.stream:
                result = delivery.result
                await self._channel.append_tokens(
                    result.namespace, result.job_id, (), finished=True
                )
        return epoch

    async def aclose(self) -> None:
        """Publish and note what waits, and stop; idempotent."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                size = min(len(self._waiting), self._max_group)
                group = [self._waiting.popleft() for _ in range(size)]
                try:
                    epoch = await self.send([delivery for delivery, _ in group])
                except Exception as exc:  # noqa: BLE001  raised where each of them is waited for
                    _log.warning("results not published yet", results=size, reason=str(exc))
                    self._tell(group, exc)
                    continue
                self._tell(group, None)
                await self._mark([delivery for delivery, _ in group], epoch)
            if self._closed:
                return

    def _tell(
        self, group: Sequence[tuple[Delivery, asyncio.Future[None]]], exc: Exception | None
    ) -> None:
        for _, future in group:
            if future.done():
                continue  # whoever waited was cancelled
            if exc is None:
                future.set_result(None)
            else:
                future.set_exception(exc)

    async def _mark(self, deliveries: Sequence[Delivery], epoch: str | None) -> None:
        published = {delivery.result.job_id: delivery.result.token for delivery in deliveries}
        try:
            await self._jobs.mark_published(published, epoch=epoch)
        except Exception as exc:  # noqa: BLE001  the publisher must outlive it
            # They are published once more, with the same token: consumers drop the repeat.
            _log.warning("publication not noted", results=len(published), reason=str(exc))
