"""``promptmill cache``: what is stored, and how to have it forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from schema.errors import JobNotFoundError
from workers.cli.shared import Json, Namespace, job_id, print_json, say, settings_with, table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from redis.asyncio import Redis

    from workers.store.answers import PostgresAnswers

app = typer.Typer(help="Look at stored answers, and have them forgotten.", no_args_is_help=True)


@app.command()
def stats(namespace: Namespace = None, as_json: Json = False) -> None:
    """Show what is stored, and what it has saved."""
    from dataclasses import asdict

    async def ask(answers: PostgresAnswers, _redis: Redis, tenant: str) -> dict[str, Any]:
        return asdict(await answers.stats(tenant))

    found: dict[str, Any] = _with_answers(namespace, ask)
    if as_json:
        print_json(found)
    else:
        table(("what", "how many"), [(name.replace("_", " "), found[name]) for name in found])


@app.command()
def invalidate(
    tag: Annotated[str | None, typer.Option(help="Those that carry this tag.")] = None,
    model: Annotated[str | None, typer.Option(help="Those of this served model.")] = None,
    answer: Annotated[list[str] | None, typer.Option(help="This answer, by its id.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of the namespace.")] = False,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Forget stored answers, in the store and in every worker's memory.

    For example:

        promptmill cache invalidate --tag prices-2024

        promptmill cache invalidate --all --namespace staging
    """
    ids = [job_id(text) for text in answer or ()] or None

    async def forget(answers: PostgresAnswers, redis: Redis, tenant: str) -> int:
        forgotten = await answers.invalidate(
            tenant, tag=tag, model=model, ids=ids, everything=everything
        )
        await _announce(redis, tenant, ids=ids, tag=tag, model=model)
        return forgotten

    forgotten = _with_answers(namespace, forget)
    if as_json:
        print_json({"forgotten": forgotten})
    else:
        say(f"{forgotten} answers forgotten")


@app.command("report-bad")
def report_bad(
    answer: Annotated[str, typer.Argument(metavar="ID", help="Id of the stored answer.")],
    reason: Annotated[str, typer.Option(help="Why, for those who look later.")] = "reported",
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Mark an answer as bad: it is never served again. Lists the jobs that were given it."""
    answer_id = job_id(answer)

    async def report(answers: PostgresAnswers, redis: Redis, tenant: str) -> list[Any]:
        used_by = await answers.report_bad(tenant, answer_id, reason)
        if used_by is None:
            msg = f"namespace {tenant!r} has no answer {answer_id}"
            raise JobNotFoundError(msg)
        await _announce(redis, tenant, ids=[answer_id])
        return list(used_by)

    used_by: list[Any] = _with_answers(namespace, report)
    if as_json:
        print_json({"answer": answer_id, "used_by": used_by})
        return
    say(f"answer {answer_id} is never served again; {len(used_by)} jobs were given it")
    for used in used_by:
        print(used)


async def _announce(redis: Redis, namespace: str, **which: Any) -> None:
    import orjson

    from schema import names
    from workers.streams import broker_errors

    notice = {"v": names.WIRE_VERSION, "namespace": namespace, **which}
    with broker_errors("announcing what was forgotten"):
        await redis.publish(names.INVALIDATIONS, orjson.dumps(notice))


def _with_answers(
    namespace: str | None, work: Callable[[PostgresAnswers, Redis, str], Awaitable[Any]]
) -> Any:
    import asyncio

    from workers.connection import Connection

    settings = settings_with()

    async def run() -> Any:
        connection = await Connection.open(settings)
        try:
            from workers.store.answers import PostgresAnswers

            answers = PostgresAnswers(connection.require_database())
            return await work(answers, connection.redis, namespace or settings.namespace)
        finally:
            await connection.aclose()

    return asyncio.run(run())
