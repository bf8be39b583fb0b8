"""`GrowingText`: the text of a job's answers, put on a token stream while they grow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schema.errors import BrokerUnavailableError

if TYPE_CHECKING:
    from workers.channel import ResultChannel
    from workers.store.records import ClaimedJob


class GrowingText:
    """Takes the text of a job's answers in pieces; Redis away costs only deltas.

    Args:
        channel: Where the pieces go.
        job: Whose answers they are.
    """

    def __init__(self, channel: ResultChannel, job: ClaimedJob) -> None:
        self._channel = channel
        self._job = job
        self._begun = False

    async def __call__(self, index: int, offset: int, text: str) -> None:
        """Put a piece on the stream.

        Args:
            index: Of the answer.
            offset: Characters of it that came before.
            text: What came now.
        """
        try:
            if not self._begun:
                # A run before this one may have left a part of its own answer.
                self._begun = True
                await self._channel.drop_tokens(self._job.namespace, self._job.id)
            await self._channel.append_tokens(
                self._job.namespace, self._job.id, [(index, offset, text)]
            )
        except BrokerUnavailableError:
            return  # the answer itself comes from Postgres
