"""`Publisher`: puts committed outcomes on their channels, in company, and notes that it did."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

from workers.store.records import Delivery

if TYPE_CHECKING:
    from typing import TypeAlias

    from workers.channel import ResultChannel
    from workers.store.jobs import JobStore

    #: Outcomes that came together, and who waits for their publication.
    _Waiting: TypeAlias = tuple[tuple[Delivery, ...], asyncio.Future[None]]

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
        self._waiting: deque[_Waiting] = deque()
        self._unmarked: dict[str | None, dict[UUID, int]] = {}  # by the epoch Redis bore
        self._wake = asyncio.Event()
        self._published = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
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
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._run(), name="promptmill-publisher"),
                asyncio.create_task(self._keep_account(), name="promptmill-published"),
            ]
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((tuple(deliveries), future))
        self._wake.set()
        await future

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
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
            # What was published last is noted last.
            self._published.set()
        self._tasks = []

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._send(self._group())
            if self._closed:
                return

    def _group(self) -> list[_Waiting]:
        """Take what waits, up to the bound; what came together stays together."""
        group: list[_Waiting] = []
        size = 0
        while self._waiting and (not group or size + len(self._waiting[0][0]) <= self._max_group):
            group.append(self._waiting.popleft())
            size += len(group[-1][0])
        return group

    async def _send(self, group: list[_Waiting]) -> None:
        deliveries = [delivery for some, _ in group for delivery in some]
        try:
            epoch = await self.send(deliveries)
        except Exception as exc:  # noqa: BLE001  raised where each of them is waited for
            _log.warning("results not published yet", results=len(deliveries), reason=str(exc))
            self._tell(group, exc)
            return
        unmarked = self._unmarked.setdefault(epoch, {})
        for delivery in deliveries:
            unmarked[delivery.result.job_id] = delivery.result.token
        self._published.set()
        self._tell(group, None)

    def _tell(self, group: Sequence[_Waiting], exc: Exception | None) -> None:
        for _, future in group:
            if future.done():
                continue  # whoever waited was cancelled
            if exc is None:
                future.set_result(None)
            else:
                future.set_exception(exc)

    async def _keep_account(self) -> None:
        """Note what was published, beside the next publication and never in its way."""
        while not (self._closed and self._tasks[0].done() and not self._unmarked):
            await self._published.wait()
            self._published.clear()
            while self._unmarked:
                epoch = next(iter(self._unmarked))
                await self._mark(self._unmarked.pop(epoch), epoch)

    async def _mark(self, published: Mapping[UUID, int], epoch: str | None) -> None:
        try:
            await self._jobs.mark_published(published, epoch=epoch)
        except Exception as exc:  # noqa: BLE001  the publisher must outlive it
            # They are published once more, with the same token: consumers drop the repeat.
            _log.warning("publication not noted", results=len(published), reason=str(exc))
