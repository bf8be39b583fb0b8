"""The command ``promptmill``. Every import that takes time is made by the command that needs it."""

from __future__ import annotations

import sys

try:
    from workers.cli.root import app, main
except ImportError:
    from workers.strangers import explanation

    if (reason := explanation()) is None:
        raise
    print(f"promptmill: {reason}", file=sys.stderr)
    sys.exit(2)

__all__ = ["app", "main"]
