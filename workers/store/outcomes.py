"""Ending jobs: outcome, answer, analysis and vectors in one transaction, and its publication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from workers.store import stored_json
from workers.store.answer_writes import put_answers
from workers.store.deliveries import delivery
from workers.store.part import StorePart, pairs
from workers.store.records import Finished

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from workers.engine.protocols import StoredAnswer
    from workers.store.records import Delivery, Held, Outcome

# As in `workers.store.claims`, rows are found by id alone and locked in that order. What is to be
# written comes along with the lock: joined to it afterwards, it would be by a nested loop. A job
# that needed no run is ended as it would be claimed and ended: a row written once instead of twice.
_FINISH = text(
    """
    WITH mine AS (
        SELECT jobs.id, outcome.state, outcome.result, outcome.error, outcome.provenance,
               outcome.answer_id, outcome.token, outcome.unclaimed
        FROM unnest(
            CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:states AS text[]),
            CAST(:results AS text[]), CAST(:errors AS text[]), CAST(:provenances AS text[]),
            CAST(:answer_ids AS uuid[]), CAST(:unclaimed AS boolean[])
        ) AS outcome (id, token, state, result, error, provenance, answer_id, unclaimed)
             JOIN jobs ON jobs.id = outcome.id
        WHERE CASE WHEN outcome.unclaimed
              THEN jobs.token = outcome.token - 1 AND jobs.state = 'queued' AND crashes = 0
                   AND NOT cancel_requested AND available_at <= now()
                   AND (deadline_at IS NULL OR deadline_at > now())
              ELSE jobs.token = outcome.token AND lease_until IS NOT NULL END
        ORDER BY jobs.id
        FOR NO KEY UPDATE OF jobs
    )
    UPDATE jobs
    SET state = mine.state, result = CAST(mine.result AS jsonb), token = mine.token,
        attempts = attempts + CASE WHEN mine.unclaimed THEN 1 ELSE 0 END,
        started_at = CASE WHEN mine.unclaimed THEN now() ELSE started_at END,
        error = CAST(mine.error AS jsonb), provenance = mine.provenance,
        answer_id = mine.answer_id, finished_at = now(), lease_owner = NULL, lease_until = NULL
    FROM mine
    WHERE jobs.id = mine.id
    RETURNING jobs.id
    """
)

# One that is locked, as all that wait are while a Redis that lost its data is made good, must not
# keep the others from being ended: it is left to a claim, which waits for it.
_FINISH_UNCLAIMED = text(_FINISH.text.replace("UPDATE OF jobs", "UPDATE OF jobs SKIP LOCKED"))

# Every other way a job ends moves the token on, so one that is over under a run's own token was
# ended by that run: the commit went through and the word of it was lost.
_ENDED_BEFORE = text(
    """
    SELECT jobs.id
    FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS run (id, token)
         JOIN jobs ON jobs.id = run.id AND jobs.token = run.token
    WHERE finished_at IS NOT NULL
    """
)

# The epoch is locked: who enters a new one waits for this, and this for him. So nothing that went
# to a Redis that has lost it is marked behind his back. It is not waited for until it is on disk:
# a mark that is lost has the outcome published once more.
_MARK_PUBLISHED = text(
    """
    WITH same AS MATERIALIZED (
        SELECT set_config('synchronous_commit', 'off', true)
        FROM broker WHERE epoch = :epoch FOR SHARE
    ),
    mine AS (
        SELECT jobs.id
        FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS run (id, token)
             JOIN jobs ON jobs.id = run.id AND jobs.token = run.token
        WHERE finished_at IS NOT NULL AND coalesce(published_at, 'infinity') = 'infinity'
          AND EXISTS (SELECT FROM same)
        ORDER BY jobs.id
        FOR NO KEY UPDATE OF jobs
    )
    UPDATE jobs SET published_at = now() FROM mine WHERE jobs.id = mine.id
    """
)

_UNPUBLISHED = text(
    """
    SELECT id, namespace, channel, options, state, token, custom_id, batch_id, finished_at,
           error, result
    FROM jobs
    WHERE published_at IS NULL AND NOT (state IN ('queued', 'running'))
      AND finished_at < now() - make_interval(secs => :older_than_s)
    ORDER BY finished_at
    LIMIT :limit
    """
)


class Outcomes(StorePart):
    """Commits outcomes and keeps account of their publication."""

    async def finish(self, outcomes: Sequence[Outcome]) -> Finished:
        """End jobs, with what belongs to them, in one transaction.

        An outcome counts only while its run holds the job, or, when it needed no run, while the
        job may be claimed. Answers of outcomes that are refused are not stored. A second call with
        the same outcomes changes nothing and accepts them again, so that a commit of which no word
        came back may be repeated; one that needed no run is refused then, since another may have
        ended the job under that token, and recovery publishes it.

        Args:
            outcomes: At most one a job; of several, the first counts.

        Returns:
            Which stand and which were refused.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now. Whether it committed is open.
        """
        if not outcomes:
            return Finished(accepted=frozenset(), refused=frozenset())
        first = {outcome.job_id: outcome for outcome in reversed(outcomes)}
        # With no answer to store it is one statement, which needs no begin and no commit.
        alone = all(outcome.answer is None for outcome in outcomes)
        lend = self._database.connection if alone else self._database.transaction
        async with lend() as connection:
            accepted: frozenset[UUID] = frozenset()
            for statement, unclaimed in ((_FINISH, False), (_FINISH_UNCLAIMED, True)):
                these = [one for one in first.values() if one.unclaimed is unclaimed]
                if these:
                    ended = await connection.scalars(statement, _columns(these))
                    accepted |= frozenset(ended.all())
            answers = _answers(first, accepted)
            if answers:
                await put_answers(answers, connection)
            runs = {
                job_id: outcome.token
                for job_id, outcome in first.items()
                if job_id not in accepted and not outcome.unclaimed
            }
            if runs:
                accepted |= frozenset((await connection.scalars(_ENDED_BEFORE, pairs(runs))).all())
        return Finished(accepted=accepted, refused=frozenset(first) - accepted)

    async def mark_published(self, published: Held, *, epoch: str | None) -> None:
        """Note that outcomes are on their channels; a second time changes nothing.

        Args:
            published: Fencing token by job, as published.
            epoch: What Redis bore when it took them; nothing is noted when Postgres is in another,
                for Redis may have lost them meanwhile.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            await connection.execute(_MARK_PUBLISHED, {**pairs(published), "epoch": epoch})

    async def unpublished(self, *, older_than_s: float, limit: int) -> list[Delivery]:
        """Return outcomes that were committed and not marked as published, oldest first.

        Args:
            older_than_s: Seconds since the commit; younger ones are probably on their way.
            limit: How many at most.

        Returns:
            What has to be published, of all namespaces.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"older_than_s": older_than_s, "limit": limit}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_UNPUBLISHED, values)).mappings().all()
        return [delivery(row) for row in rows]


def _columns(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "ids": [outcome.job_id for outcome in outcomes],
        "tokens": [outcome.token for outcome in outcomes],
        "states": [outcome.result.status.value for outcome in outcomes],
        "results": [stored_json.dump_text(outcome.result.json_text) for outcome in outcomes],
        "errors": [
            None if outcome.result.error is None else stored_json.dump_model(outcome.result.error)
            for outcome in outcomes
        ],
        "provenances": [
            None if outcome.provenance is None else outcome.provenance.value for outcome in outcomes
        ],
        "answer_ids": [outcome.answer_id for outcome in outcomes],
        "unclaimed": [outcome.unclaimed for outcome in outcomes],
    }


def _answers(outcomes: dict[UUID, Outcome], accepted: frozenset[UUID]) -> list[StoredAnswer]:
    return [
        outcome.answer
        for job_id, outcome in outcomes.items()
        if outcome.answer is not None and job_id in accepted
    ]
