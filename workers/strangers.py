"""Other people's packages named ``schema`` or ``workers``. The standard library alone is used.

Both names are common. A folder or an installed package of that name can hide ours, after which no
command works; so this is also what the command says when its own imports fail.
"""

from __future__ import annotations

import sys
from pathlib import Path

_NAMES = ("schema", "workers")
_OURS = {"schema": "wire.py", "workers": "pipeline.py"}  # a file by which ours is known
REMEDY = (
    "uninstall what brings it (`pip uninstall schema` for the validation library of that name), "
    "or start promptmill from another folder and leave that one out of PYTHONPATH"
)


def found(search_path: list[str] | None = None) -> list[Path]:
    """Return modules and packages of our names on the search path that are not ours.

    Args:
        search_path: Folders; None takes this process' ``sys.path``.
    """
    paths = []
    for folder in dict.fromkeys(sys.path if search_path is None else search_path):
        for name in _NAMES:
            package = Path(folder or ".") / name
            if (package / _OURS[name]).is_file():
                continue
            module = package.with_suffix(".py")
            if module.is_file():
                paths.append(module.absolute())
            elif (package / "__init__.py").is_file():
                paths.append(package.absolute())
    return paths


def explanation() -> str | None:
    """Return one line on what hides our packages, or None when nothing does."""
    paths = found()
    if not paths:
        return None
    return f"{paths[0]} is not promptmill's and stands in its way; {REMEDY}"
