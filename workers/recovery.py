"""`Recovery`: puts right what dead processes and lost messages left behind.

Every worker runs one; an advisory lock lets one at a time do a pass. A pass

1. puts jobs whose holder has gone back in the queue,
2. ends jobs that nobody will: past their deadline, or cancelled under a dead worker,
3. sends what has no message: retries that are due, and rows whose producer died,
4. sends again what had a message that is lost,
5. publishes what was committed and not published, and
6. writes rows for jobs that came in full and are in dead hands (`workers.stranded`).

Before that it looks whether Redis has lost its data (`workers.data_loss`), and after it notes how
far the consumer groups have read.

Each step does a bounded part; while there is more, the next pass follows at once. All of it may
happen twice without harm: a second message finds its jobs claimed, and a second publication
carries the same job id and token.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import structlog

from schema.errors import ServiceError
from workers.cancellation import end, heed_cancellation
from workers.store.locks import RECOVERY, only_one

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import datetime

    from workers.data_loss import DataLoss
    from workers.store.database import Database
    from workers.store.jobs import JobStore
    from workers.store.records import Delivery, JobAddress

_log = structlog.get_logger(__name__)
#: Seconds that it may take to find what a Redis that lost its data had been given.
_LOSS_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovered:
    """What one pass did."""

    requeued: int = 0  # jobs taken back from holders that have gone
    ended: int = 0  # jobs ended that nobody would have ended
    sent: int = 0  # jobs sent that had no message
    sent_again: int = 0  # jobs sent whose message was lost
    published: int = 0  # outcomes published that were committed only
    adopted: int = 0  # jobs that got a row, as no worker had written it
    lost: int = 0  # outcomes among them, or to come, that Redis had and lost
    more: bool = False  # whether a step stopped at its bound

    @property
    def anything(self) -> bool:
        """Whether the pass did something."""
        return any(self.by_action().values())

    def by_action(self) -> dict[str, int]:
        """Return the numbers of jobs by what was done to them."""
        return {
            "requeued": self.requeued,
            "ended": self.ended,
            "sent": self.sent,
            "sent_again": self.sent_again,
            "published": self.published,
            "adopted": self.adopted,
        }


class Recovery:
    """Puts right what dead processes and lost messages left behind, every few seconds.

    Args:
        database: For the lock that lets one worker at a time do it.
        jobs: The job store, on the same database.
        send: Writes queue messages for jobs. Recovery notes them as sent afterwards.
        publish: Puts outcomes on their channels, and returns the epoch that Redis bore then.
            Recovery notes them as published afterwards.
        oldest_live_message_at: Returns the moment, by Postgres' clock, before which every message
            written has left the queue for good: neither waiting nor held by a worker. None when
            it cannot be told, and then no message is taken for lost. A job in a long backlog is
            thus not sent again and again.
        data_loss: Notices that Redis lost its data.
        adopt: Writes rows for jobs that have none; returns how many.
        every_s: Seconds between passes.
        new_row_grace_s: Seconds that the producer of a new row has to send its message.
        publish_grace_s: Seconds that a worker has to publish what it committed.
        clock_slack_s: Seconds that clocks of message writers may differ from Postgres'.
        pass_timeout_s: Seconds after which a pass is cut, so that a server that hangs does not
            keep the lock from others.
        batch: Jobs a step does at most in one pass.
    """

    def __init__(
        self,
        *,
        database: Database,
        jobs: JobStore,
        send: Callable[[Sequence[JobAddress]], Awaitable[None]],
        publish: Callable[[Sequence[Delivery]], Awaitable[str | None]],
        oldest_live_message_at: Callable[[], Awaitable[datetime | None]],
        data_loss: DataLoss,
        adopt: Callable[[], Awaitable[int]],
        every_s: float = 2.0,
        new_row_grace_s: float = 5.0,
        publish_grace_s: float = 5.0,
        clock_slack_s: float = 5.0,
        pass_timeout_s: float = 60.0,
        batch: int = 500,
    ) -> None:
        self._database = database
        self._jobs = jobs
        self._send = send
        self._publish = publish
        self._oldest_live_message_at = oldest_live_message_at
        self._data_loss = data_loss
        self._adopt = adopt
        self._every_s = every_s
        self._new_row_grace_s = new_row_grace_s
        self._publish_grace_s = publish_grace_s
        self._clock_slack = timedelta(seconds=clock_slack_s)
        self._pass_timeout_s = pass_timeout_s
        self._batch = batch
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        #: Told what each pass did.
        self.on_pass: Callable[[Recovered], None] = lambda _done: None

    def start(self) -> None:
        """Start the passes; idempotent. To be called on the loop that the database belongs to."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="recovery")

    def wake(self) -> None:
        """Let the next pass begin at once, as when jobs were given back."""
        self._wake.set()

    async def aclose(self) -> None:
        """Stop; idempotent. A pass that is under way is cut, which leaves nothing half done."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def run_once(self) -> Recovered | None:
        """Do one pass.

        Returns:
            What it did, or None when another worker is at it.

        Raises:
            ServiceError: Postgres or Redis cannot be used now.
            TimeoutError: The pass took too long.
        """
        async with (
            asyncio.timeout(self._pass_timeout_s) as limit,
            only_one(self._database, RECOVERY) as mine,
        ):
            return await self._pass(limit) if mine else None

    async def _run(self) -> None:
        while True:
            heed_cancellation()
            more = False
            try:
                done = await self.run_once()
            except (ServiceError, TimeoutError) as exc:
                # The servers are away; the pipeline says so more loudly. The next pass tries anew.
                _log.warning("recovery waits", reason=str(exc) or type(exc).__name__)
            except Exception:  # noqa: BLE001  logged with its traceback, and tried again
                # Others rely on recovery when something is broken, so it outlives a broken pass.
                _log.exception("a pass of recovery failed")
            else:
                if done is not None and done.anything:
                    more = done.more
                    self.on_pass(done)
                    _log.info("recovered", **done.by_action())
            if not more:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._every_s)
                self._wake.clear()

    async def _pass(self, limit: asyncio.Timeout) -> Recovered:
        done: dict[str, int] = {}
        failed: list[Exception] = []
        for name, step in (
            ("lost", partial(self._heed_loss, limit)),
            ("requeued", self._requeue),
            ("ended", self._end),
            ("sent", self._send_unsent),
            ("sent_again", self._send_lost),
            ("published", self._publish_late),
            ("adopted", self._adopt),
        ):
            try:
                done[name] = await step()
            except Exception as exc:  # noqa: BLE001  raised below
                # What one step stumbles over must not keep the others from their work.
                failed.append(exc)
        if failed:
            raise failed[0]
        await self._data_loss.note_positions()
        return Recovered(**done, more=any(count >= self._batch for count in done.values()))

    async def _heed_loss(self, limit: asyncio.Timeout) -> int:
        loop = asyncio.get_running_loop()
        # A backlog of millions takes its time to be written.
        limit.reschedule(loop.time() + _LOSS_TIMEOUT_S)
        lost = await self._data_loss.heed()
        limit.reschedule(loop.time() + self._pass_timeout_s)
        return lost

    async def _requeue(self) -> int:
        return len(await self._jobs.expired_leases(limit=self._batch))

    async def _end(self) -> int:
        ended = await self._jobs.end_overdue(limit=self._batch)
        await self._deliver(ended)
        return len(ended)

    async def _send_unsent(self) -> int:
        unsent = await self._jobs.unsent(limit=self._batch, older_than_s=self._new_row_grace_s)
        await self._dispatch(unsent)
        return len(unsent)

    async def _send_lost(self) -> int:
        lost = await self._lost_messages()
        await self._dispatch(lost)
        return len(lost)

    async def _publish_late(self) -> int:
        late = await self._jobs.unpublished(older_than_s=self._publish_grace_s, limit=self._batch)
        await self._deliver(late)
        return len(late)

    async def _lost_messages(self) -> list[JobAddress]:
        low_water = await self._oldest_live_message_at()
        if low_water is None:
            return []
        return await self._jobs.sent_before(low_water - self._clock_slack, limit=self._batch)

    async def _dispatch(self, jobs: Sequence[JobAddress]) -> None:
        if jobs:
            await self._send(jobs)
            # Noted afterwards: a crash in between costs a second message, never a job.
            await self._jobs.mark_sent(job.id for job in jobs)

    async def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        if deliveries:
            epoch = await self._publish(deliveries)
            await self._jobs.mark_published(
                {delivery.result.job_id: delivery.result.token for delivery in deliveries},
                epoch=epoch,
            )
