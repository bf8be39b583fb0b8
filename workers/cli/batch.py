"""``promptmill batch``: files in OpenAI's batch format."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from schema.errors import InvalidFileError, InvalidRequestError, ServiceError
from workers.cli.shared import (
    FAILED,
    Json,
    Model,
    Namespace,
    job_id,
    need_worker_package,
    print_json,
    say,
    settings_with,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from workers.aio_client import AsyncJobClient
    from workers.batch_progress import BatchProgress
    from workers.settings import Settings

app = typer.Typer(help="Answer files of requests in OpenAI's batch format.", no_args_is_help=True)

Input = Annotated[str, typer.Argument(metavar="IN", help="One request a line; .gz, .zst or - too.")]
Output = Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="Answers; - too.")]
BatchId = Annotated[str, typer.Argument(metavar="ID", help="Id of a batch.")]
Errors = Annotated[
    str | None,
    typer.Option("--errors", metavar="FILE", help="Rows that failed go here instead of to OUT."),
]
Schema = Annotated[
    str | None,
    typer.Option("--schema", metavar="FILE", help="JSON schema that every answer must fit."),
]
Reuse = Annotated[
    str | None, typer.Option(help="Stored answers that will do: off, exact, always, semantic.")
]
Priority = Annotated[int | None, typer.Option(help="0 is served first, 9 last.")]


@app.command()
def run(
    source: Input,
    output: Output,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    retry: Annotated[
        str | None,
        typer.Option(help="Answer rows of a finished output anew: failed or truncated."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="New limit of every row; needed to mend truncated.")
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Keep the order of the input.")
    ] = False,
    window: Annotated[int, typer.Option(min=1, help="Rows under way at most.")] = 4096,
    grouped: Annotated[
        bool, typer.Option(help="Run rows that begin alike next to each other.")
    ] = True,
    errors: Errors = None,
    schema: Schema = None,
    model: Model = None,
    namespace: Namespace = None,
    reuse: Reuse = None,
    priority: Priority = None,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Do not start a worker, even if none runs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer every row of IN, and write the answers to OUT as they come.

    A row that is wrong gets a line that says so. OUT appears when it is complete; until then its
    lines are in OUT.partial. Each says how its answer came about, and the summary at the end what
    was saved. Rows that begin alike run next to each other, and equal ones once. Where no server
    is configured, the embedded ones are used, and a worker is started unless one runs.

    For example:

        promptmill batch run questions.jsonl -o answers.jsonl

        promptmill batch run questions.jsonl.gz -o answers.jsonl.gz --resume

        cat questions.jsonl | promptmill batch run - -o - --ordered > answers.jsonl

        promptmill batch run in.jsonl -o out.jsonl --retry truncated --max-tokens 2000

        promptmill batch run in.jsonl -o out.jsonl --errors wrong.jsonl --schema answer.json
    """
    from workers.batch import BatchOptions, run_batch
    from workers.batch_input import check_input
    from workers.batch_output import check_outputs

    options = BatchOptions(
        namespace=namespace,
        model=model,
        resume=resume,
        redo=_redo(retry),
        max_tokens=max_tokens,
        ordered=ordered,
        window=window,
        grouped=grouped,
        errors=errors,
        schema=_schema(schema),
        job=_job_options(reuse, priority),
    )
    # Before a worker is started for nothing.
    check_input(source)
    check_outputs(output, errors, source)
    settings = settings_with()
    with (
        _resumable(output, anew=not resume and retry is None),
        _worker(settings, start=not no_worker),
        _progress(source) as show,
    ):

        async def work(client: AsyncJobClient) -> BatchProgress:
            if not await client.served_models():
                say(
                    "no worker is known to run, and rows wait for one; start it with: promptmill up"
                )
            return await run_batch(client, source, output, options, on_progress=show)

        summary: BatchProgress = _with_client(settings, work)
    if as_json and output != "-":
        print_json(summary.summary())
    else:
        say(_sentence(summary))
    if summary.failed:
        raise typer.Exit(FAILED)


@app.command()
def submit(
    source: Input,
    schema: Schema = None,
    model: Model = None,
    namespace: Namespace = None,
    reuse: Reuse = None,
    priority: Priority = None,
    as_json: Json = False,
) -> None:
    """Submit every row of IN and return at once; print the batch's id.

    For example:

        ID=$(promptmill batch submit questions.jsonl)

        promptmill batch status $ID

        promptmill batch results $ID -o answers.jsonl --wait
    """
    from workers.batch import BatchOptions
    from workers.batch_jobs import submit_batch

    options = BatchOptions(
        namespace=namespace,
        model=model,
        schema=_schema(schema),
        job=_job_options(reuse, priority),
    )
    found = _with_client(settings_with(), lambda client: submit_batch(client, source, options))
    if as_json:
        print_json(found)
    else:
        print(found["id"])


@app.command()
def status(batch: BatchId, namespace: Namespace = None, as_json: Json = False) -> None:
    """Show where a batch stands."""
    from workers.batch_jobs import describe

    batch_id = job_id(batch)
    _show(
        [_with_client(settings_with(), lambda c: describe(c, batch_id, namespace=namespace))],
        as_json=as_json,
        one=True,
    )


@app.command("list")
def list_all(
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List batches, newest first."""
    from workers.batch_jobs import list_batches

    found = _with_client(
        settings_with(), lambda c: list_batches(c, namespace=namespace, limit=limit)
    )
    _show(found, as_json=as_json)


@app.command()
def cancel(batch: BatchId, namespace: Namespace = None, as_json: Json = False) -> None:
    """Cancel what waits and stop what runs of a batch; answers that are there stay."""
    from workers.batch_jobs import cancel_batch

    batch_id = job_id(batch)
    _show(
        [_with_client(settings_with(), lambda c: cancel_batch(c, batch_id, namespace=namespace))],
        as_json=as_json,
        one=True,
    )


@app.command()
def results(
    batch: BatchId,
    output: Output = "-",
    errors: Errors = None,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Wait until every row is over.")
    ] = False,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Write what a batch has answered so far, in file order.

    While rows are missing, a file is left as OUT.partial, and the exit code is 1.

    For example:

        promptmill batch results 6f9619ff-8b86-4d01-b42d-00cf4fc964ff -o answers.jsonl --wait
    """
    from workers.batch_jobs import collect, wait_until_over
    from workers.cli.progress import batch_waiting

    batch_id = job_id(batch)

    async def work(client: AsyncJobClient) -> Any:
        if wait:
            with batch_waiting() as show:
                await wait_until_over(client, batch_id, namespace=namespace, on_progress=show)
        return await collect(client, batch_id, output, errors=errors, namespace=namespace)

    found = _with_client(settings_with(), work)
    if as_json and output != "-":
        print_json(found)
    if not found["complete"]:
        counts = found["request_counts"]
        over = counts["completed"] + counts["failed"]
        so_far = "" if output == "-" else f"; what there is stands in {output}.partial"
        why = " (its file broke off)" if found["failed_at"] is not None else ""
        rows = f"{over} of {counts['total']} rows are over"
        if found["status"] == "completed":
            rows += ", but some shared a job with another: the output of its run has all of them"
        say(f"the batch is {found['status']}{why}: {rows}{so_far}")
        raise typer.Exit(FAILED)


def _schema(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    import orjson

    from workers.json_schemas import check_schema

    try:
        schema: Any = orjson.loads(Path(path).read_bytes())
    except OSError as exc:
        msg = f"cannot be read: {exc.strerror or exc}"
        raise InvalidFileError(msg, path=path) from exc
    except orjson.JSONDecodeError as exc:
        msg = f"is not JSON ({exc})"
        raise InvalidFileError(msg, path=path) from None
    if not isinstance(schema, dict):
        msg = "must hold a JSON schema: an object"
        raise InvalidFileError(msg, path=path)
    check_schema(schema)
    return schema


def _redo(retry: str | None) -> Literal["failed", "truncated"] | None:
    known: dict[str | None, Literal["failed", "truncated"] | None] = {
        None: None,
        "failed": "failed",
        "truncated": "truncated",
    }
    if retry in known:
        return known[retry]
    msg = "must be failed or truncated"
    raise InvalidRequestError(msg, field="retry", value=retry)


def _job_options(reuse: str | None, priority: int | None) -> dict[str, Any]:
    given = {"reuse": reuse, "priority": priority}
    options = {name: value for name, value in given.items() if value is not None}
    # Once, before the first row: else every row would get the same error.
    from workers.submission import build_spec

    build_spec("probe", options)
    return options


def _with_client(settings: Settings, work: Callable[[AsyncJobClient], Awaitable[Any]]) -> Any:
    import asyncio

    from workers.aio_client import AsyncJobClient

    async def within() -> Any:
        async with AsyncJobClient(settings) as client:
            return await work(client)

    return asyncio.run(within())


@contextlib.contextmanager
def _worker(settings: Settings, *, start: bool) -> Iterator[None]:
    # Whoever names a server runs workers there; this machine may not even have an engine.
    if not start or settings.redis_url is not None:
        yield
        return
    need_worker_package()
    from workers import devices
    from workers.cli.progress import waiting

    with contextlib.ExitStack() as stack:
        with waiting("starting a worker, since none runs") as told:
            stack.enter_context(devices.ensure_worker(settings, on_event=told))
        yield


@contextlib.contextmanager
def _resumable(output: str, *, anew: bool) -> Iterator[None]:
    """Say, when a run ends before its end, what is safe and how to go on; and if nobody does."""
    partial = Path(f"{output}.partial")
    named = output != "-"
    if anew and named and partial.is_file() and partial.stat().st_size:
        say(f"{partial} of a run that was interrupted is begun anew; --resume would go on with it")
    try:
        yield
    except (KeyboardInterrupt, ServiceError):
        if named and partial.exists():
            say(f"what is in {partial} is safe, and --resume goes on from there")
        raise


@contextlib.contextmanager
def _progress(source: str) -> Iterator[Callable[[BatchProgress], None]]:
    from workers.cli.progress import batch_progress

    with batch_progress(source) as show:
        yield show


def _sentence(progress: BatchProgress) -> str:
    rate = progress.written / max(progress.elapsed_s, 1e-9)
    parts = [f"{progress.written} rows in {progress.elapsed_s:.1f} s ({rate:.1f} a second)"]
    if progress.kept:
        parts.append(f"{progress.kept} kept from before")
    if progress.changed:
        parts.append(f"{progress.changed} changed since and answered anew")
    if progress.completion_tokens:
        parts.append(f"{progress.completion_tokens} tokens")
    if progress.cached:
        saved = progress.saved
        parts.append(
            f"{progress.cached_share:.0%} from cache, which saved {saved.completion_tokens} tokens "
            f"and {saved.engine_s:.1f} s of generation"
        )
    parts.append(f"{progress.failed} failed")
    return ", ".join(parts)


def _show(found: list[dict[str, Any]], *, as_json: bool, one: bool = False) -> None:
    if as_json:
        print_json(found[0] if one else found)
        return
    columns = ("batch", "status", "input", "rows", "done", "failed", "created")
    table(
        columns,
        (
            (
                batch["id"],
                batch["status"],
                batch["input_file_id"],
                batch["request_counts"]["total"],
                batch["request_counts"]["completed"],
                batch["request_counts"]["failed"],
                datetime.fromtimestamp(batch["created_at"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
            )
            for batch in found
        ),
    )
