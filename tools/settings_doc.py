"""Prints docs/settings.md: every setting, from the class that reads them.

``python tools/settings_doc.py > docs/settings.md``; a test compares the two.
"""

from __future__ import annotations

import types
import typing
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from workers.settings import ENV_PREFIX, Settings

HEAD = """\
# Settings

Every process reads its settings once, from the environment. A wrong value is refused with its name,
the value and what would be right; secrets are masked in every message and repr. An empty variable
counts as one that is not set. This page is made by `python tools/settings_doc.py`.

| Variable | Values | Default | What it is |
|---|---|---|---|
"""

_BOUNDS = (("gt", "> {}"), ("ge", "≥ {}"), ("lt", "< {}"), ("le", "≤ {}"))


def values_of(field: FieldInfo) -> str:
    """Return what a field takes, in words."""
    kinds = [kind for kind in typing.get_args(field.annotation) if kind is not types.NoneType] or [
        field.annotation
    ]
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in kinds)
    if typing.get_origin(field.annotation) is dict:
        return "JSON object"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    words = [names.get(kinds[0], "text")]
    for name, form in _BOUNDS:
        words += [
            form.format(f"{bound:,}")
            for part in field.metadata
            if (bound := getattr(part, name, None)) is not None
        ]
    return ", ".join([words[0], " and ".join(words[1:])] if words[1:] else words)


def default_of(field: FieldInfo) -> str:
    """Return a field's default, or "none" where the description says what happens."""
    if field.default is PydanticUndefined or field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{field.default}`".lower()
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return f"`{field.default}`"


def render() -> str:
    """Return the page."""
    lines = [
        f"| `{ENV_PREFIX}{name.upper()}` | {values_of(field)} | {default_of(field)} "
        f"| {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
