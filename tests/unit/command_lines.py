"""Whether a command line of promptmill would be understood, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer.main


def command_tree() -> Any:
    """The command `promptmill`, as click sees it."""
    return typer.main.get_command(import_module("workers.cli").app)


def check_command(words: Sequence[str], *, mention: bool = False) -> None:
    """Parse the words after ``promptmill`` as the command would.

    Args:
        words: The words.
        mention: Whether the command is only named, so that arguments may be left out.

    Raises:
        ClickException: It would be refused: an unknown command or option, a value that is no
            number, an argument too many or too few.
    """
    command, rest, parent = command_tree(), list(words), None
    name = "promptmill"
    while True:
        try:
            context = command.make_context(name, rest, parent=parent)
        except Exception as exc:
            if mention and type(exc).__name__ == "MissingParameter":
                return
            raise
        if not hasattr(command, "resolve_command"):
            return
        # A group keeps what follows its own options.
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        parent = context
