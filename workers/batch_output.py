"""Writing a batch's answers: what is unfinished never bears the name of what is complete.

Lines go to ``OUT.partial``, which becomes ``OUT`` by one rename when the last line is on disk.
Beside it, ``OUT.partial.json`` says which batch it belongs to, so that a run that was interrupted
goes on with the same jobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import os
import shutil
import sys
from array import array
from bisect import bisect_left
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal
from uuid import UUID, uuid4

import orjson

from schema.errors import ConfigurationError, InvalidFileError
from schema.openai_batch import id_digest
from workers import parquet
from workers.batch_input import STANDARD, open_input

if TYPE_CHECKING:
    from collections.abc import Callable

_FLUSH_BYTES = 1 << 20
Redo = Literal["failed", "truncated"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What an earlier run left behind."""

    digests: array[int]  # of the rows that are answered, sorted: 8 bytes each, where a set has 70
    failed: int  # of those answered, with an error

    @property
    def answered(self) -> int:
        """How many rows are answered."""
        return len(self.digests)

    def __contains__(self, custom_id: str) -> bool:
        """Whether a row is answered."""
        digest = id_digest(custom_id)
        place = bisect_left(self.digests, digest)
        return place < len(self.digests) and self.digests[place] == digest


class BatchOutput:
    """The output of one batch run.

    Args:
        path: The file, ``-`` for standard output; ``.gz`` and ``.zst`` are compressed at the end.
        errors: File for the lines of rows that failed; None leaves them among the others.
        identity: What tells the input from others; see `workers.batch_input.identity`.
        resume: Whether to go on with what an earlier run left.
        redo: Rows of the earlier run to be answered anew.

    Raises:
        InvalidFileError: It cannot be written, or another run is writing it.
    """

    def __init__(
        self,
        path: str,
        *,
        errors: str | None = None,
        identity: dict[str, object] | None = None,
        resume: bool = False,
        redo: Redo | None = None,
    ) -> None:
        self.path = path
        self.batch_id: UUID = uuid4()
        self.kept = Kept(digests=array("Q"), failed=0)
        self._errors_path = errors
        self._apart: BinaryIO | None = None  # takes failed lines beside standard output
        self._unflushed = 0
        self._journal = Path(f"{path}.partial.json")
        self._partial = Path(f"{path}.partial")
        self._file: BinaryIO = sys.stdout.buffer
        if path == STANDARD:
            if resume or redo:
                msg = "standard output cannot be resumed; name a file"
                raise InvalidFileError(msg, path=path)
            if errors is not None:
                with self._errors(errors):
                    self._apart = Path(f"{errors}.partial").open("wb")  # noqa: SIM115  `close` does
            return
        for file in filter(None, (path, errors)):
            _check_form(file)
        with self._errors():
            self._open(identity, resume=resume, redo=redo)

    def write(self, line: bytes, *, failed: bool = False) -> None:
        """Append one line.

        Args:
            line: With its newline.
            failed: Whether it tells of a failure.

        Raises:
            InvalidFileError: It cannot be written, as on a full disk. Lines before it are safe.
        """
        with self._errors():
            if failed and self._apart is not None:
                self._apart.write(line)
                return
            self._file.write(line)
            self._unflushed += len(line)
            if self._unflushed >= _FLUSH_BYTES:
                self.flush()

    def flush(self) -> None:
        """Hand to the system what was written.

        Raises:
            InvalidFileError: It cannot be written.
        """
        with self._errors():
            self._file.flush()
            self._unflushed = 0

    def complete(self) -> None:
        """Give the output its name: every row is in it.

        Raises:
            InvalidFileError: It cannot be written; the partial output stays.
        """
        with self._errors():
            self._file.flush()
            if self.path == STANDARD:
                self._complete_apart()
                return
            os.fsync(self._file.fileno())
            if self._errors_path is not None:
                self._complete_both(self._errors_path)
            else:
                _publish(self._partial, self.path)
            self._journal.unlink(missing_ok=True)
            self._file.close()

    def _complete_apart(self) -> None:
        if self._apart is not None and self._errors_path is not None:
            self._apart.close()
            _publish(Path(self._apart.name), self._errors_path)

    def _complete_both(self, errors: str) -> None:
        """Part the lines; the partial output goes last, so that a second try finds it whole."""
        good, bad = Path(f"{self.path}.good"), Path(f"{errors}.bad")
        with self._partial.open("rb") as lines, good.open("wb") as fine, bad.open("wb") as wrong:
            for line in lines:
                (wrong if orjson.loads(line)["error"] is not None else fine).write(line)
        if bad.stat().st_size:
            _publish(bad, errors)
        else:
            # As OpenAI has it: no failure, no file. One of an earlier run would be taken for ours.
            bad.unlink()
            Path(errors).unlink(missing_ok=True)
        _publish(good, self.path)
        self._partial.unlink()

    def close(self) -> None:
        """Close without completing: what was written waits to be resumed. Idempotent."""
        for file in (None if self.path == STANDARD else self._file, self._apart):
            if file is not None and not file.closed:
                with contextlib.suppress(OSError):  # a full disk was reported when it was met
                    file.close()

    def _open(self, identity: dict[str, object] | None, *, resume: bool, redo: Redo | None) -> None:
        if Path(self.path).is_dir():
            msg = "is a folder; name a file"
            raise InvalidFileError(msg, path=self.path)
        file = self._partial.open("a+b")
        self._file = file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            msg = "another run is writing this output"
            raise InvalidFileError(msg, path=self.path) from None
        if not resume and not redo:
            file.truncate(0)
        else:
            self._take_up(identity, redo)
        note = {"v": 1, "batch_id": str(self.batch_id), "input": identity}
        self._journal.write_bytes(orjson.dumps(note))

    def _take_up(self, identity: dict[str, object] | None, redo: Redo | None) -> None:
        note = _read_journal(self._journal)
        # Other rows under the same names, or the same rows wanted anew, are other jobs.
        if note and not redo and note.get("input") == identity:
            self.batch_id = UUID(note["batch_id"])
        if self._partial.stat().st_size == 0:
            for former in (self.path, self._errors_path):
                if former is not None and Path(former).is_file() and Path(former).stat().st_size:
                    _copy_lines(former, self._file)
            self._file.flush()
        self.kept = _tidy(self._partial, self._file, _REDO[redo] if redo else None)

    @contextlib.contextmanager
    def _errors(self, path: str | None = None) -> Any:
        path = path or self.path
        try:
            yield
        except OSError as exc:
            if isinstance(exc, BrokenPipeError):
                msg = "whoever read the output has gone"
                raise InvalidFileError(msg, path=path) from exc
            safe = f"; what is in {self._partial} is safe, and --resume goes on from there"
            msg = f"cannot be written: {exc.strerror or exc}"
            known = self.path != STANDARD and self._partial.exists()
            raise InvalidFileError(msg + (safe if known else ""), path=path) from exc


def check_output(path: str) -> None:
    """Refuse an output that cannot be written, before anything is started for it.

    Args:
        path: The file, or ``-``.

    Raises:
        InvalidFileError: It is a folder, or its folder is missing or not writable.
    """
    if path == STANDARD:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        msg = "is a folder; name a file"
    elif not folder.is_dir():
        msg = "cannot be written: its folder does not exist"
    elif not os.access(folder, os.W_OK | os.X_OK):
        msg = "cannot be written: its folder may not be written by this user"
    else:
        return
    raise InvalidFileError(msg, path=path)


def _read_journal(journal: Path) -> dict[str, Any] | None:
    try:
        note = orjson.loads(journal.read_bytes())
        UUID(note["batch_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(note)


def _tidy(path: Path, file: BinaryIO, again: Callable[[dict[str, Any]], bool] | None) -> Kept:
    """Drop the torn last line and the rows to be redone, in place; return what stays.

    Lines about wrong input go too: they are written anew whenever the input is read. Kept lines
    only ever move towards the beginning, so that none is overwritten before it is read.
    """
    digests = array("Q")
    failed = place = 0
    with path.open("rb") as reader, path.open("r+b") as writer:
        for line in reader:
            row = _row(line)
            if row is None or (again is not None and again(row)):
                continue
            failed += _is_failed(row)
            digests.append(id_digest(row["custom_id"]))
            writer.seek(place)
            writer.write(line)
            place += len(line)
        writer.flush()
    file.truncate(place)
    return Kept(digests=array("Q", sorted(digests)), failed=failed)


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
        return None
    return None if "line" in (row.get("promptmill") or {}) else row


def _is_failed(row: dict[str, Any]) -> bool:
    return row.get("error") is not None


def _is_truncated(row: dict[str, Any]) -> bool:
    body = (row.get("response") or {}).get("body") or {}
    return any(choice.get("finish_reason") == "length" for choice in body.get("choices") or ())


_REDO = {"failed": _is_failed, "truncated": _is_truncated}


def _check_form(path: str) -> None:
    """Refuse at the beginning what could not be written at the end."""
    if path.endswith(".zst") and find_spec("zstandard") is None:
        msg = "writing .zst needs the package zstandard: pip install zstandard"
        raise ConfigurationError(msg)
    if path.endswith(parquet.ENDING):
        parquet.pyarrow("pyarrow.parquet")


def _copy_lines(former: str, file: BinaryIO) -> None:
    if former.endswith(parquet.ENDING):
        file.writelines(parquet.former_lines(former))
        return
    with open_input(former) as complete:
        shutil.copyfileobj(complete, file)


def _publish(source: Path, target: str) -> None:
    """Give a whole file its name, in the form that the name asks for."""
    if not target.endswith((".gz", ".zst", parquet.ENDING)):
        source.replace(target)
        return
    made = Path(f"{target}.tmp")
    if target.endswith(parquet.ENDING):
        parquet.write(source, made)
        made.replace(target)
        source.unlink()
        return
    with source.open("rb") as plain:
        if target.endswith(".gz"):
            with gzip.open(made, "wb") as packed:
                shutil.copyfileobj(plain, packed)
        else:
            with made.open("wb") as out:
                import_module("zstandard").ZstdCompressor().copy_stream(plain, out)
    made.replace(target)
    source.unlink()
