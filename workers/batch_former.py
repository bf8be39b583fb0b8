"""What an earlier run left of an output: which rows stay, and how a file is changed safely.

A file is never changed in a way that a kill could leave half done: at most its end is cut off;
whatever else is to change is written to a file of its own, which then takes the place of the old.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from uuid import UUID

import orjson

from schema.errors import InvalidFileError
from schema.openai_batch import BadLine, BatchLine, BatchParser, id_digest
from workers.batch_forms import dropped_on_failure
from workers.batch_input import BROKEN, lines_of, open_input
from workers.batch_order import asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Redo = Literal["failed", "truncated"]


class DigestMap:
    """Numbers by digest: 16 bytes for each, where a dictionary has a hundred.

    Args:
        keys: Digests; of equal ones the last counts.
        values: Their numbers.
    """

    def __init__(self, keys: array[int], values: array[int]) -> None:
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._keys = array("Q", (keys[at] for at in order))
        self._values = array("Q", (values[at] for at in order))

    def get(self, key: int) -> int | None:
        """Return the number of a digest, or None when it has none."""
        place = bisect_left(self._keys, key + 1) - 1
        return self._values[place] if place >= 0 and self._keys[place] == key else None


@dataclass(kw_only=True)
class Kept:
    """The rows that an earlier run has answered."""

    digests: array[int] = field(default_factory=lambda: array("Q"))  # 8 bytes each; a set has 70
    failed: int = 0  # of those answered, with an error
    changed: int = 0  # were answered, but ask something else by now: to be answered anew

    @property
    def answered(self) -> int:
        """How many rows are answered."""
        return len(self.digests)

    def __contains__(self, custom_id: str) -> bool:
        """Whether a row is answered."""
        digest = id_digest(custom_id)
        place = bisect_left(self.digests, digest)
        return place < len(self.digests) and self.digests[place] == digest


class Sieve:
    """Tells which lines of an earlier output stay, and counts them.

    Lines about wrong input go: they are written anew whenever the input is read. So do lines that
    were torn when a run was killed.

    Args:
        redo: Rows to be answered anew.
        questions: What the rows of the input ask, by the digest of their names; None when the
            input is known to be the one that the output was begun with.
    """

    def __init__(self, redo: Redo | None, questions: DigestMap | None = None) -> None:
        self._redo = _REDO[redo] if redo else None
        self._questions = questions
        self.kept = Kept()

    def stays(self, line: bytes) -> bool:
        """Whether a line stays.

        Args:
            line: With its end.
        """
        row = _row(line)
        if row is None or (self._redo is not None and self._redo(row)):
            return False
        digest = id_digest(row["custom_id"])
        if self._questions is not None and (was := own(row).get("asked")) is not None:
            now = self._questions.get(digest)
            if now is not None and f"{now:016x}" != was:
                self.kept.changed += 1
                return False
        self.kept.digests.append(digest)
        self.kept.failed += is_failed(row)
        return True

    def finish(self) -> Kept:
        """Return what was kept."""
        self.kept.digests = array("Q", sorted(self.kept.digests))
        return self.kept


def questions_of(source: str) -> DigestMap:
    """Read what the rows of an input ask.

    Args:
        source: A file that can be read again.

    Raises:
        InvalidFileError: It cannot be read to its end.
    """
    names, questions = array("Q"), array("Q")
    parser = BatchParser()
    try:
        with open_input(source) as file:
            for number, raw in lines_of(source, file):
                line = parser.parse(number, raw)
                if isinstance(line, BatchLine):
                    names.append(id_digest(line.custom_id))
                    questions.append(asked(line.url, line.body))
    except BROKEN as exc:
        raise InvalidFileError(f"broke off: {exc}", path=source) from exc
    return DigestMap(names, questions)


def lock(path: Path) -> BinaryIO:
    """Open a file to append to it, and keep others from doing so.

    Args:
        path: The file; it is made when it is missing.

    Raises:
        InvalidFileError: Another run has it.
        OSError: It cannot be opened.
    """
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have given it its name, or put another in its place, in this moment.
        ours = os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except OSError:
        ours = False
    if ours:
        return file
    file.close()
    msg = "another run is writing this output"
    raise InvalidFileError(msg, path=str(path).removesuffix(".partial"))


def cut(path: Path, file: BinaryIO, sieve: Sieve) -> bool:
    """Cut off the end of a file that does not stay, if that is all that does not.

    Args:
        path: The file.
        file: The same, locked.
        sieve: Tells what stays.

    Returns:
        Whether it was; otherwise the file is as it was.
    """
    place = end = 0
    with path.open("rb") as lines:
        for line in lines:
            place += len(line)
            if sieve.stays(line):
                if end != place - len(line):
                    return False
                end = place
    file.truncate(end)
    return True


def replaced(path: Path, file: BinaryIO, lines: Iterable[bytes]) -> BinaryIO:
    """Put a file of other lines in the place of one, whole or not at all.

    Args:
        path: The file.
        file: The same, locked; it is closed.
        lines: What it is to hold.

    Returns:
        The new one, locked.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    made = Path(f"{path}.new")
    made.unlink(missing_ok=True)
    fresh = lock(made)
    with dropped_on_failure(made):
        fresh.writelines(lines)
        fresh.flush()
        os.fsync(fresh.fileno())
        made.replace(path)
    file.close()
    return fresh


def place_key(line: BatchLine | BadLine) -> int:
    """Return what a row of the input and its line in the output have in common.

    Args:
        line: The row.
    """
    return _bad_key(line.number) if isinstance(line, BadLine) else id_digest(line.custom_id)


def in_order(path: Path, order: array[int]) -> Iterator[bytes]:
    """Yield the lines of an output in the order of the input; what is not in that comes last.

    Args:
        path: The output.
        order: `place_key` of every row of the input.
    """
    places = DigestMap(order, array("Q", range(len(order))))
    starts, others = array("q", [-1]) * len(order), array("q")
    with path.open("rb") as lines:
        start = 0
        for line in lines:
            row = orjson.loads(line)
            number = own(row).get("line")
            place = None if number is None else places.get(_bad_key(number))
            # A row may be found wrong after it was read, too.
            if place is None and row["custom_id"] is not None:
                place = places.get(id_digest(row["custom_id"]))
            if place is None:
                others.append(start)
            else:
                starts[place] = start
            start += len(line)
        for start in chain(starts, others):
            if start >= 0:
                lines.seek(start)
                yield lines.readline()


def read_journal(journal: Path) -> dict[str, Any] | None:
    """Return what a run noted of itself, or None when there is no such note.

    Args:
        journal: The file.
    """
    try:
        note = orjson.loads(journal.read_bytes())
        UUID(note["batch_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(note)


def write_journal(journal: Path, note: dict[str, Any]) -> None:
    """Note what a run is, whole or not at all: without it, rows under way would run twice.

    Args:
        journal: The file.
        note: JSON types.
    """
    if read_journal(journal) == note:
        return
    made = Path(f"{journal}.new")
    with dropped_on_failure(made):
        made.write_bytes(orjson.dumps(note))
        made.replace(journal)


def own(row: dict[str, Any]) -> dict[str, Any]:
    """Return what an output line says in ``promptmill``; nothing where others wrote it."""
    found = row.get("promptmill")
    return found if isinstance(found, dict) else {}


def is_failed(row: dict[str, Any]) -> bool:
    """Whether an output line tells of a failure."""
    return row.get("error") is not None


def _is_truncated(row: dict[str, Any]) -> bool:
    body = (row.get("response") or {}).get("body") or {}
    return any(choice.get("finish_reason") == "length" for choice in body.get("choices") or ())


_REDO: dict[Redo, Callable[[dict[str, Any]], bool]] = {
    "failed": is_failed,
    "truncated": _is_truncated,
}


def _bad_key(number: int) -> int:
    return id_digest(f"\0line {number}")  # no name holds a NUL


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
        return None
    return None if "line" in own(row) else row
