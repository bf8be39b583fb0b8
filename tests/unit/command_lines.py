"""Whether a command line of promptmill would be understood, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer.main


def command_tree() -> Any:
    """The command `promptmill`, as click sees it."""
    return typer.main.get_command(import_module("workers.cli").app)


def check_command(words: Sequence[str]) -> None:
    """Parse the words after ``promptmill`` as the command would.

    Raises:
        ClickException: It would be refused: an unknown command or option, a value that is no
            number, an argument too many or too few.
    """
    command, rest, parent = command_tree(), list(words), None
    name = "promptmill"
    while True:
        context = command.make_context(name, rest, parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        # A group keeps what follows its own options.
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        parent = context
