"""``promptmill cache``: what is stored, and how to have it forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from schema.errors import InvalidRequestError, JobNotFoundError
from workers.cli.shared import Json, Namespace, job_id, print_json, say, settings_with, table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from redis.asyncio import Redis

    from workers.store.answers import AnswerStats, PostgresAnswers
    from workers.store.reuse_labels import DecisionRecord, Label, ReuseReport

app = typer.Typer(help="Look at stored answers, and have them forgotten.", no_args_is_help=True)


@app.command()
def stats(namespace: Namespace = None, as_json: Json = False) -> None:
    """Show what is stored, what it has saved, and how reuse by meaning went.

    The rate of wrong reuse comes from explicit labels alone, with its 95 % interval (E. B. Wilson,
    1927). Agreement, of shadow mode, is how alike two answers are, not whether they are correct.
    """
    from dataclasses import asdict

    async def ask(
        answers: PostgresAnswers, _redis: Redis, tenant: str
    ) -> tuple[AnswerStats, ReuseReport]:
        return await answers.stats(tenant), await answers.reuse_report(tenant)

    stored, reuse = _with_answers(namespace, ask)
    if as_json:
        print_json({**asdict(stored), "reuse": asdict(reuse)})
    else:
        table(("what", "how many"), [*_stored_rows(stored), *_reuse_rows(reuse)])


@app.command()
def decisions(
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 50,
    served: Annotated[bool, typer.Option("--served", help="Only those for a neighbour.")] = False,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List decisions for and against reuse by meaning, newest first."""
    from dataclasses import asdict

    async def ask(answers: PostgresAnswers, _redis: Redis, tenant: str) -> list[DecisionRecord]:
        return await answers.decisions(tenant, limit=limit, served_only=served)

    found: list[DecisionRecord] = _with_answers(namespace, ask)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    columns = ("decision", "answer", "similarity", "served", "shadow", "rule", "label")
    table(
        columns,
        (
            (
                one.id,
                one.answer_id,
                f"{one.similarity:.3f}",
                one.served,
                one.shadow,
                one.rule,
                one.label,
            )
            for one in found
        ),
    )


@app.command()
def label(
    which: Annotated[
        str,
        typer.Argument(
            metavar="DECISION_OR_ANSWER", help="Id of a decision, or of an answer that was served."
        ),
    ],
    verdict: Annotated[str, typer.Argument(metavar="right|wrong", help="What you say of it.")],
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Say whether a decision on reuse was right; rates of wrong reuse come from this alone.

    For example:

        promptmill cache label 6f9619ff-8b86-4d01-b42d-00cf4fc964ff wrong
    """
    chosen = job_id(which)

    async def say_so(answers: PostgresAnswers, _redis: Redis, tenant: str) -> int:
        # The store checks the word, and names those there are.
        labelled = await answers.label(tenant, chosen, cast("Label", verdict))
        if not labelled:
            msg = f"namespace {tenant!r} has no decision {chosen}, nor one that served it"
            raise InvalidRequestError(msg)
        return labelled

    labelled = _with_answers(namespace, say_so)
    if as_json:
        print_json({"labelled": labelled})
    else:
        say(f"{labelled} decisions labelled {verdict}")


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


def _stored_rows(stored: AnswerStats) -> Iterator[tuple[str, object]]:
    from dataclasses import asdict

    for name, number in asdict(stored).items():
        yield name.replace("_", " "), number


def _reuse_rows(reuse: ReuseReport) -> Iterator[tuple[str, object]]:
    for kind, jobs in reuse.hits_by_kind.items():
        yield f"jobs answered: {kind}", jobs
    for rule, refused in reuse.refused_by_rule.items():
        yield f"refused by rule: {rule}", refused
    if reuse.compared and reuse.agreement is not None:
        yield "agreement in shadow mode (not correctness)", f"{reuse.agreement:.3f}"
        yield "answers compared in shadow mode", reuse.compared
    yield "rate of wrong reuse, from labels", _rate(reuse)


def _rate(reuse: ReuseReport) -> str:
    labelled = reuse.labelled_right + reuse.labelled_wrong
    if reuse.wrong_rate is None or reuse.wrong_rate_low is None or reuse.wrong_rate_high is None:
        return "unknown: no decision has been labelled"
    return (
        f"{reuse.wrong_rate:.1%} ({reuse.labelled_wrong} of {labelled} labelled; "
        f"95 % interval {reuse.wrong_rate_low:.1%} to {reuse.wrong_rate_high:.1%})"
    )


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
