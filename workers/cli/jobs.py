"""``promptmill jobs``: looking at jobs, cancelling them, running them once more."""

from __future__ import annotations

from typing import Annotated

import typer

from workers.cli.shared import (
    Json,
    Namespace,
    job_id,
    job_rows,
    print_json,
    say,
    settings_with,
)

app = typer.Typer(help="Look at jobs, cancel them, run them once more.", no_args_is_help=True)
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of jobs.")]
State = Annotated[
    str | None,
    typer.Option(help="queued, running, done, failed, cancelled or expired."),
]


@app.command("list")
def list_jobs(
    state: State = None,
    batch: Annotated[str | None, typer.Option(help="Only those of one batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first.

    For example:

        promptmill jobs list --state failed --json
    """
    from workers.client import JobClient

    with JobClient.from_settings(settings_with()) as client:
        batch_id = job_id(batch) if batch else None
        found = client.jobs(namespace=namespace, state=state, batch_id=batch_id, limit=limit)
    if as_json:
        print_json(found)
    else:
        job_rows(found)


@app.command()
def show(
    job: Annotated[str, typer.Argument(metavar="ID", help="Id of a job.")],
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Show a job: where it stands, what it asked, what came of it."""
    from workers.client import JobClient

    with JobClient.from_settings(settings_with()) as client:
        status = client.status(job, namespace=namespace)
        request = client.request(job, namespace=namespace)
        over = status.state.terminal
        result = client.result(job, timeout_s=0, namespace=namespace) if over else None
    if as_json:
        print_json({"status": status, "request": request, "result": result})
        return
    job_rows([status])
    print_json({"request": request})
    if result is not None:
        print_json({"result": result})


@app.command()
def cancel(jobs: Ids, namespace: Namespace = None, as_json: Json = False) -> None:
    """Cancel jobs: at once those that wait, as soon as their worker hears of it those that run."""
    from workers.client import JobClient

    with JobClient.from_settings(settings_with()) as client:
        done = {job: client.cancel(job, namespace=namespace) for job in jobs}
    if as_json:
        print_json(done)
        return
    for job, cancelled in done.items():
        say(f"{job}: {'cancelled' if cancelled else 'was over already'}")


@app.command()
def retry(
    jobs: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Ids.")] = None,
    batch: Annotated[str | None, typer.Option(help="All of one batch that failed.")] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="Only those that ended so. Default: all but done.")
    ] = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Run jobs that are over once more, as if they had never run.

    For example:

        promptmill jobs retry 6f9619ff-8b86-4d01-b42d-00cf4fc964ff

        promptmill jobs retry --batch 0b0c5a1e-6f0e-4a0a-9df0-5e7c6a1c2b3d --state failed
    """
    from workers.client import JobClient

    with JobClient.from_settings(settings_with()) as client:
        again = client.retry(
            *(jobs or ()),
            namespace=namespace,
            batch_id=job_id(batch) if batch else None,
            states=state or ("failed", "expired", "cancelled"),
        )
    if as_json:
        print_json(again)
    else:
        say(f"{len(again)} queued once more")
