"""The forms that a batch's output may have by its name: plain, compressed, Parquet."""

from __future__ import annotations

import contextlib
import gzip
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError, InvalidFileError
from workers import parquet
from workers.batch_input import BROKEN, open_input

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_form(path: str) -> None:
    """Refuse at the beginning what could not be written at the end.

    Args:
        path: The file.

    Raises:
        ConfigurationError: What its form needs is not installed.
    """
    if path.endswith(".zst") and find_spec("zstandard") is None:
        msg = "writing .zst needs the package zstandard: pip install zstandard"
        raise ConfigurationError(msg)
    if path.endswith(parquet.ENDING):
        parquet.pyarrow("pyarrow.parquet")


@contextlib.contextmanager
def dropped_on_failure(*files: Path) -> Iterator[None]:
    """Take away what was not finished: on a full disk it would only take up room.

    Args:
        files: To be removed where what follows fails.
    """
    try:
        yield
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


def publish(source: Path, target: str) -> None:
    """Give a whole file its name, in the form that the name asks for.

    Args:
        source: The file, of plain lines; it is gone afterwards.
        target: The name.

    Raises:
        OSError: It cannot be written; `source` stays.
    """
    if not target.endswith((".gz", ".zst", parquet.ENDING)):
        source.replace(target)
        return
    made = Path(f"{target}.tmp")
    with dropped_on_failure(made):
        _convert(source, made, target)
        made.replace(target)
    source.unlink()


def _convert(source: Path, made: Path, target: str) -> None:
    if target.endswith(parquet.ENDING):
        parquet.write(source, made)
        return
    with source.open("rb") as plain:
        if target.endswith(".gz"):
            with gzip.open(made, "wb") as packed:
                shutil.copyfileobj(plain, packed)
        else:
            with made.open("wb") as out:
                import_module("zstandard").ZstdCompressor().copy_stream(plain, out)


def former_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a complete output, each with its end.

    Args:
        path: The file, in the form that its name says.

    Raises:
        InvalidFileError: It cannot be read to its end.
    """
    try:
        if path.endswith(parquet.ENDING):
            yield from parquet.former_lines(path)
            return
        with open_input(path) as file:
            for line in file:
                yield line if line.endswith(b"\n") else line + b"\n"
    except BROKEN as exc:
        raise InvalidFileError(f"broke off: {exc}", path=path) from exc
