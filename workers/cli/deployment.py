"""Commands of those who run the service: ``up``, ``worker``, ``db``, ``config``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from schema.errors import ConfigurationError, InvalidFileError
from workers.cli.shared import (
    Json,
    need_worker_package,
    print_json,
    say,
    settings_with,
    table,
)

db = typer.Typer(help="Look after the database.", no_args_is_help=True)
config = typer.Typer(help="Look at the settings.", no_args_is_help=True)

ModelPath = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model folder or hub name. Default: the bundled model."),
]
EngineArgs = Annotated[
    list[str] | None,
    typer.Option(
        help="An engine argument of vLLM's: --engine-arg max_model_len=8192. A name alone switches "
        "it on, =false off; lists and objects are JSON."
    ),
]
VllmArgs = Annotated[
    list[str] | None,
    typer.Option("--vllm-arg", help="Argument of vLLM's, such as --vllm-arg=--enforce-eager."),
]

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML: engine_args for vLLM, and for `up` workers too."),
]

#: Scheme, user and password, host with port and path; what follows may hold a password too.
_ADDRESS = re.compile(
    r"(\w[\w+]*://)([^/@?#\s]*@)?((?:\[[\w:.]+\]|[^/@?#:\s]*)(?::\d+)?(?:/[^?#@]*)?)(?:\?[^@]*)?"
)


def register(app: typer.Typer) -> None:
    """Add the commands that stand at the root.

    Args:
        app: The root.
    """
    app.command()(up)
    app.command()(worker)


def up(
    model: ModelPath = None,
    gpus: Annotated[
        str | None, typer.Option(help="0,1:2,3 is two workers on two GPUs each. Default: the CPU.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers, on the CPU.")] = None,
    engine_arg: EngineArgs = None,
    vllm_arg: VllmArgs = None,
    config_file: ConfigFile = None,
) -> None:
    """Run the stack and its workers until Ctrl-C; print "ready" when jobs are taken.

    A model of the hub is fetched first; a bar shows how far it is. Several workers on the CPU get
    cores of their own, and VLLM_CPU_KVCACHE_SPACE (GiB) is divided among them.

    For example:

        promptmill up

        promptmill up --model Qwen/Qwen3-0.6B --gpus 0:1

        promptmill up --engine-arg max_model_len=8192 --engine-arg enforce_eager=true

        promptmill up --config fleet.yaml

    The file names models and where they run; the arguments are vLLM's, for all or for some:

        engine_args: {max_model_len: 8192}

        workers:

        - {model: Qwen/Qwen3-0.6B, gpus: "0,1:2"}

        - {model: intfloat/e5-small-v2, gpus: "3", engine_args: {runner: pooling}}
    """
    need_worker_package()
    settings = settings_with(model=model)
    from workers import devices, fleet_file

    code = devices.up(
        settings,
        gpus=gpus,
        workers=workers,
        engine_args=_engine_args(engine_arg, vllm_arg),
        file=fleet_file.read(config_file) if config_file else None,
        on_event=lambda text: print(text, flush=True),
        on_line=say,
    )
    raise typer.Exit(code)


def worker(
    model: ModelPath = None,
    engine_arg: EngineArgs = None,
    vllm_arg: VllmArgs = None,
    config_file: ConfigFile = None,
) -> None:
    """Run one worker on the devices that CUDA_VISIBLE_DEVICES names, until it is told to stop.

    SIGTERM lets it finish what runs (PROMPTMILL_DRAIN_S) and hands the rest back.
    """
    need_worker_package()
    settings = settings_with(model=model)
    from workers import endpoints, serving
    from workers.devices import Device, Post, end_with_starter, fetch_models
    from workers.worker_process import READY

    supervised = end_with_starter(drain_s=settings.drain_s)
    # Before vLLM is imported, which reads the environment as it is then.
    serving.prepare_environment(log_format=settings.log_format)
    words = (*_file_words(config_file), *_engine_args(engine_arg, vllm_arg))
    if not supervised:
        fetch_models(settings, [Post(device=Device(), engine_args=words)], on_event=say)
    served = serving.served_model(settings, engine_args=words)
    found = endpoints.find(settings)
    try:
        if found.database_url is None:
            msg = "a worker needs the database; set PROMPTMILL_DATABASE_URL"
            raise ConfigurationError(msg)
        if not found.embedded:
            from workers.store import schema_upgrade

            # Before a model is loaded, which takes its time.
            schema_upgrade.refuse_older(found.database_url)
        from workers.app import run_worker

        code = run_worker(
            settings, endpoints=found, model=served, on_ready=lambda: print(READY, flush=True)
        )
    finally:
        found.close()
    raise typer.Exit(code)


def _file_words(config_file: Path | None) -> tuple[str, ...]:
    if config_file is None:
        return ()
    from workers import fleet_file

    file = fleet_file.read(config_file)
    if file.workers:
        msg = "names workers; one worker takes engine_args alone: `promptmill up` runs several"
        raise InvalidFileError(msg, path=config_file)
    return file.words()


def _engine_args(named: list[str] | None, plain: list[str] | None) -> list[str]:
    from workers.serving import engine_words, named_arguments

    return [*engine_words(named_arguments(named or ())), *(plain or ())]


@db.command()
def upgrade(as_json: Json = False) -> None:
    """Bring the tables to this version's revision. The embedded database does so by itself."""
    settings = settings_with()
    from workers import endpoints
    from workers.store import schema_upgrade

    url = settings.database_url and settings.database_url.get_secret_value()
    # A database of one's own needs no Redis to be upgraded.
    found = None if url else endpoints.find(settings)
    try:
        address = url or (found.database_url if found else None)
        if address is None:
            msg = "there is no database to upgrade; set PROMPTMILL_DATABASE_URL"
            raise ConfigurationError(msg)
        before = schema_upgrade.current(address)
        schema_upgrade.upgrade(address)
        after = schema_upgrade.current(address)
    finally:
        if found is not None:
            found.close()
    if as_json:
        print_json({"before": before, "after": after})
    else:
        say(f"at revision {after}" + ("" if before == after else f" (was {before or 'empty'})"))


@config.command()
def show(as_json: Json = False) -> None:
    """Show every setting, its value, and where that comes from; secrets are masked."""
    from workers.settings import ENV_PREFIX, Settings

    settings = settings_with()
    rows: list[dict[str, Any]] = []
    for name, field in Settings.model_fields.items():
        variable = f"{ENV_PREFIX}{name.upper()}"
        value = getattr(settings, name)
        rows.append(
            {
                "name": name,
                "value": _masked(value),
                "origin": variable if os.environ.get(variable) else "default",
                "variable": variable,
                "description": field.description,
            }
        )
    if as_json:
        print_json(rows)
        return
    columns = ("setting", "value", "origin")
    table(columns, ((row["variable"], row["value"], row["origin"]) for row in rows))
    if sys.stdout.isatty():
        say("--json also gives what each is for")


def _masked(value: Any) -> Any:
    reveal = getattr(value, "get_secret_value", None)
    if reveal is not None:
        return _without_credentials(reveal())
    if isinstance(value, str) and "://" in value and "@" in value:
        return _without_credentials(value)  # any address may hold a password
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _without_credentials(address: str) -> str:
    # The place helps to find a mistake; user and password do not belong on a screen. Of an address
    # that is not well formed nobody can tell which part is the password.
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return f"{address.partition(':')[0]}://(cannot be read: percent-encode user and password)"
    scheme, who, place = found.groups()
    return f"{scheme}{'***@' if who else ''}{place}"
