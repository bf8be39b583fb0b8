"""What must hold after a run, and what was counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sqlalchemy import text

from schema.jobs import JobResult, JobState
from tests.acceptance.faults.scripted_worker import REFUSED, scripted_answer
from tests.acceptance.faults.traffic import Consumers, Producer
from workers.store.claims import MAX_CRASHES, SET_ASIDE
from workers.store.database import Database
from workers.store.deliveries import result

_ROWS = text(
    """
    SELECT id, namespace, channel, options, state, token, custom_id, batch_id, finished_at, error,
           result, published_at, crashes
    FROM jobs
    """
)


@dataclass
class Stored:
    """One row after the run."""

    result: JobResult
    published_at: datetime | None
    crashes: int


@dataclass
class Verdict:
    """What was found."""

    wrong: list[str] = field(default_factory=list)  # each breaks a promise
    set_aside: int = 0  # jobs ended by the rule on deaths: more workers died than a job may see
    counts: dict[str, int] = field(default_factory=dict)


async def open_jobs(database: Database) -> int:
    """Jobs that are not over, or whose outcome is not published."""
    async with database.connection() as connection:
        return await connection.scalar(
            text("SELECT count(*) FROM jobs WHERE finished_at IS NULL OR published_at IS NULL")
        )


async def stored_rows(database: Database) -> dict[UUID, Stored]:
    """Every job as Postgres has it."""
    async with database.connection() as connection:
        rows = (await connection.execute(_ROWS)).mappings().all()
    return {
        row["id"]: Stored(
            result=result(row), published_at=row["published_at"], crashes=row["crashes"]
        )
        for row in rows
    }


def judge(producer: Producer, consumers: Consumers, rows: dict[UUID, Stored]) -> Verdict:
    """Compare what was accepted, what is stored, and what was delivered."""
    verdict = Verdict()
    _judge_outcomes(verdict, producer, rows)
    _judge_deliveries(verdict, consumers, rows)
    for group, delivered in consumers.by_group.items():
        verdict.wrong += [
            f"{job_id} was never delivered to {group}"
            for job_id in producer.prompts
            if job_id in rows and job_id not in delivered
        ]
    verdict.counts = {
        "jobs accepted": len(producer.prompts),
        "submissions repeated": producer.repeated,
        "outcomes stored": sum(row.result.status.terminal for row in rows.values()),
        "entries on the channels": sum(map(len, consumers.raw.values())),
        "of those, repeats": sum(len(entries) - 1 for entries in consumers.raw.values()),
        "jobs in flight when a worker died": sum(row.crashes > 0 for row in rows.values()),
        f"set aside after {MAX_CRASHES} deaths": verdict.set_aside,
        "most deaths of one job": max((row.crashes for row in rows.values()), default=0),
    }
    return verdict


def _judge_outcomes(verdict: Verdict, producer: Producer, rows: dict[UUID, Stored]) -> None:
    if extra := set(rows) - set(producer.prompts):
        verdict.wrong.append(f"{len(extra)} rows are of jobs that were not accepted")
    for job_id, prompt in producer.prompts.items():
        row = rows.get(job_id)
        if row is None:
            verdict.wrong.append(f"{job_id} was accepted and has no row")
            continue
        refused = prompt.startswith(REFUSED)
        expected = JobState.FAILED if refused else JobState.DONE
        answer = None if refused else scripted_answer(prompt)
        found = row.result
        if row.crashes >= MAX_CRASHES and found.error == SET_ASIDE:
            verdict.set_aside += 1
            continue
        if (found.status, found.text) != (expected, answer):
            said = found.error.message if found.error else found.text
            verdict.wrong.append(
                f"{job_id} ended {found.status} after {row.crashes} deaths: {said!r}"
            )


def _judge_deliveries(verdict: Verdict, consumers: Consumers, rows: dict[UUID, Stored]) -> None:
    for (job_id, token), entries in consumers.raw.items():
        results = [JobResult.model_validate_json(entry) for entry in entries]
        if any(one != results[0] for one in results):
            verdict.wrong.append(f"repeats of {job_id} under token {token} differ")
    for kind, delivered in (
        *consumers.by_group.items(),
        (
            "channel",
            {
                job_id: [JobResult.model_validate_json(entry) for entry in entries]
                for (job_id, _), entries in consumers.raw.items()
            },
        ),
    ):
        for job_id, results in delivered.items():
            if job_id not in rows:
                verdict.wrong.append(f"{kind}: {job_id} was delivered and has no row")
            elif any(one != rows[job_id].result for one in results):
                verdict.wrong.append(f"{kind}: what came of {job_id} is not what is stored")
