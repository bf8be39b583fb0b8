"""``promptmill submit``: one prompt from the command line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schema.errors import InvalidRequestError
from workers.cli.shared import FAILED, Json, Model, Namespace, print_json, say, settings_with

if TYPE_CHECKING:
    from schema.jobs import JobResult
    from workers.client import JobClient
    from workers.jobs import Job


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: The root.
    """
    app.command()(submit)


def submit(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait and print the answer.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", "-s", help="Print the answer while it grows.")
    ] = False,
    completion: Annotated[
        bool, typer.Option(help="Send the prompt as it is, without the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    model: Model = None,
    namespace: Namespace = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens the answer may have.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0, the default, is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")] = None,
    reuse: Annotated[
        str | None, typer.Option(help="Stored answers that will do: off, exact, always, semantic.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Cosine from which a near prompt's answer may do.")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(help="Last word on a near prompt: guard, engine.")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Decide on reuse and record it, but generate.")
    ] = False,
    ttl: Annotated[
        float | None, typer.Option(help="Seconds the stored answer stays reusable.")
    ] = None,
    sliding_ttl: Annotated[
        bool, typer.Option("--sliding-ttl", help="Each use starts that time anew.")
    ] = False,
    priority: Annotated[int | None, typer.Option(help="0 is served first, 9 last.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: submissions under one key are one job.")
    ] = None,
    channel: Annotated[str | None, typer.Option(help="Result channel.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Label of the stored answer.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait at most; the job goes on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Submit one prompt as a chat request; print the job's id, or wait for the answer.

    For example:

        promptmill submit "Why is the sky blue?" --wait

        promptmill submit "Why is the sky blue?" --stream --max-tokens 100

        promptmill submit "The capital of France is" --completion --wait --json

        git diff | promptmill submit - --system "Write a commit message." --wait
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    options: dict[str, Any] = {
        "sampling": {name: value for name, value in sampling.items() if value is not None},
        "namespace": namespace,
        "model": model,
        "reuse": reuse,
        "threshold": threshold,
        "verify": verify,
        "shadow": shadow or None,
        "ttl_s": ttl,
        "sliding_ttl": sliding_ttl or None,
        "priority": priority,
        "idempotency_key": key,
        "channel": channel,
        "tags": tag or None,
        "stream": stream or None,
    }
    if completion:
        if system is not None:
            msg = "belongs to a chat; leave it out, or leave out --completion"
            raise InvalidRequestError(msg, field="system", value=system)
    else:
        if not text.strip():
            msg = "is empty; give at least one visible character"
            raise InvalidRequestError(msg, field="prompt", value=text)
        turns = [{"role": "system", "content": system}] if system is not None else []
        options["messages"] = [*turns, {"role": "user", "content": text}]

    from workers.client import JobClient

    with JobClient.from_settings(settings_with()) as client:
        job = client.submit(text if completion else None, **options)
        if not wait and not stream:
            if as_json:
                print_json({"id": job.id, "namespace": job.namespace, "channel": job.channel})
            else:
                print(job.id)
            return
        _hint(client)
        if stream and not as_json:
            _print_stream(client, job)
        result = job.result(timeout)
    _show(result, as_json=as_json, printed=stream)
    if result.error is not None:
        raise typer.Exit(FAILED)


def _hint(client: JobClient) -> None:
    if not client.served_models():
        say("no worker is known to run; start one with: promptmill up")


def _print_stream(client: JobClient, job: Job) -> None:
    for delta in client.stream(job):
        if delta.index == 0:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def _show(result: JobResult, *, as_json: bool, printed: bool) -> None:
    if as_json:
        print_json(result)
    elif result.error is not None:
        say(f"{result.status.value}: {result.error.type}: {result.error.message}")
    elif not printed:
        print(result.text if result.text is not None else "")
