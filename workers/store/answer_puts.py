"""`AnswerPuts`: answers that are put at the same time share a transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schema.errors import InvalidRequestError
from workers.store.answer_writes import put_answers
from workers.store.gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from workers.engine.protocols import StoredAnswer
    from workers.store.database import Database

#: Answers in one transaction, at most.
_AT_A_TIME = 64


class AnswerPuts:
    """Writes answers for many callers together.

    Args:
        database: Where to.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._groups = Gathering(self._put_all, most=_AT_A_TIME, name="promptmill-puts")
        self._waiting: dict[UUID, StoredAnswer] = {}

    async def put(self, answer: StoredAnswer) -> None:
        """Store an answer, in company.

        Args:
            answer: The answer.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
            InvalidRequestError: Postgres cannot hold a value of this one.
        """
        self._waiting[answer.id] = answer  # of two puts of one the later knows more
        refusal = await self._groups.get(answer.id)
        if refusal is not None:
            raise refusal

    async def _put_all(self, ids: Sequence[UUID]) -> Mapping[UUID, InvalidRequestError]:
        answers = [self._waiting.pop(one) for one in ids]
        try:
            await self._put_together(answers)
        except InvalidRequestError:
            # One that Postgres cannot hold must not cost the others their place.
            return await self._put_singly(answers)
        return {}

    async def _put_singly(
        self, answers: Sequence[StoredAnswer]
    ) -> Mapping[UUID, InvalidRequestError]:
        refusals: dict[UUID, InvalidRequestError] = {}
        for answer in answers:
            try:
                await self._put_together([answer])
            except InvalidRequestError as exc:
                refusals[answer.id] = exc
        return refusals

    async def _put_together(self, answers: Sequence[StoredAnswer]) -> None:
        async with self._database.transaction() as connection:
            await put_answers(answers, connection)
