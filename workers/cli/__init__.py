"""The command ``promptmill``. Every import that takes time is made by the command that needs it."""

from __future__ import annotations

from workers.cli.root import app, main

__all__ = ["app", "main"]
