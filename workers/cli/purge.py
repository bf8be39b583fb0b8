"""``promptmill purge``: deletes all that a namespace has, and proves that it is gone."""

from __future__ import annotations

from typing import Annotated

import typer

from workers.cli.shared import FAILED, Json, print_json, say, settings_with, table


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The command's root.
    """
    app.command()(purge)


def purge(
    namespace: Annotated[
        str, typer.Option("--namespace", "-n", help="Tenant. There is no default.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds that workers have to let go of what they run.")
    ] = 30.0,
    as_json: Json = False,
) -> None:
    """Delete all jobs, answers and results of a namespace; prove that they are gone.

    Running jobs are stopped, workers forget what they hold in memory, and both servers are looked
    through again; what is left then is named, and the exit code is 1. Postgres keeps deleted rows
    on disk until it vacuums; backups and log archives are yours to look after.

    For example:

        promptmill purge --namespace team-a --yes
    """
    import asyncio
    from dataclasses import asdict

    from workers.connection import Connection
    from workers.purge import Purged
    from workers.purge import purge as run_purge

    if not yes:
        typer.confirm(f"Delete everything that namespace {namespace!r} has?", abort=True, err=True)
    settings = settings_with()

    async def run() -> Purged:
        connection = await Connection.open(settings)
        try:
            database = connection.require_database()
            return await run_purge(database, connection.redis, namespace, wait_s=wait)
        finally:
            await connection.aclose()

    done = asyncio.run(run())
    if as_json:
        print_json(asdict(done) | {"clean": done.clean})
    else:
        rows = ((kind, done.deleted.get(kind, 0), done.left.get(kind, 0)) for kind in done.kinds)
        table(("what", "deleted", "left"), rows)
    if not done.clean:
        say(f"namespace {namespace!r} still has something: does somebody go on submitting?")
        raise typer.Exit(FAILED)
    if not as_json:
        say(f"namespace {namespace!r} has nothing any more")
