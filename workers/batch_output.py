"""Writing a batch's answers: what is unfinished never bears the name of what is complete.

Lines go to ``OUT.partial``, which becomes ``OUT`` by one rename when the last line is on disk.
Beside it, ``OUT.partial.json`` says which batch it belongs to, so that a run that was interrupted
goes on with the same jobs.
"""

from __future__ import annotations

import contextlib
import os
import sys
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import UUID, uuid4

import orjson

from schema.errors import InvalidFileError
from workers import batch_former as former
from workers.batch_former import Kept, Redo
from workers.batch_forms import check_form, dropped_on_failure, former_lines, publish
from workers.batch_input import STANDARD

if TYPE_CHECKING:
    from schema.openai_batch import BadLine, BatchLine

_FLUSH_BYTES = 1 << 20
_STREAMS = ("/dev/std", "/dev/fd/", "/proc/self/fd/")


class BatchOutput:
    """The output of one batch run.

    Args:
        path: The file, ``-`` for standard output; ``.gz`` and ``.zst`` are compressed at the end.
        errors: File for the lines of rows that failed; None leaves them among the others.
        source: The input, which must be none of these files; None where there is none.
        identity: What tells the input from others; see `workers.batch_input.identity`.
        resume: Whether to go on with what an earlier run left.
        redo: Rows of the earlier run to be answered anew.
        ordered: Whether `expect` is told of every row, and their lines are to stand as they do.
        rules: How rows are treated, as JSON types. One that is None is taken from the run that is
            gone on with: else its rows under way would be other jobs, and run twice.

    Raises:
        InvalidFileError: It cannot be written, another run is writing it, or it is the input.
    """

    def __init__(
        self,
        path: str,
        *,
        errors: str | None = None,
        source: str | None = None,
        identity: dict[str, object] | None = None,
        resume: bool = False,
        redo: Redo | None = None,
        ordered: bool = False,
        rules: dict[str, Any] | None = None,
    ) -> None:
        check_outputs(path, errors, source)
        self.path = path
        self.batch_id: UUID = uuid4()
        self.kept = Kept()
        self.rules = dict(rules or {})
        self._order: array[int] | None = array("Q") if ordered and (resume or redo) else None
        self._errors_path = errors
        self._apart: BinaryIO | None = None  # takes failed lines beside a stream
        self._unflushed = 0
        self._journal = Path(f"{path}.partial.json")
        self._partial = Path(f"{path}.partial")
        self._file: BinaryIO
        self._streams = is_stream(path)
        if self._streams:
            self._open_stream(errors, again=resume or redo is not None)
            return
        for file in filter(None, (path, errors)):
            check_form(file)
        if redo and not any(map(_size, (str(self._partial), path, errors))):
            msg = "holds no answers of an earlier run; leave out --retry to answer every row"
            raise InvalidFileError(msg, path=path)
        with self._errors():
            self._open(source, identity, resume=resume, redo=redo)

    def expect(self, line: BatchLine | BadLine) -> None:
        """Be told of a row of the input, in its order; needed for `ordered` only.

        Args:
            line: The row, whether it is answered already or not.
        """
        if self._order is not None:
            self._order.append(former.place_key(line))

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
            if self._streams:
                self._complete_apart()
                return
            if self._order is not None and self.kept.answered:
                ordered = former.in_order(self._partial, self._order)
                self._file = former.replaced(self._partial, self._file, ordered)
            os.fsync(self._file.fileno())
            if self._errors_path is not None:
                self._complete_both(self._errors_path)
            else:
                publish(self._partial, self.path)
            self._journal.unlink(missing_ok=True)
            self._file.close()

    def _complete_apart(self) -> None:
        if self._apart is not None and self._errors_path is not None:
            self._apart.close()
            publish(Path(self._apart.name), self._errors_path)

    def _complete_both(self, errors: str) -> None:
        """Part the lines; the partial output goes last, so that a second try finds it whole."""
        good, bad = Path(f"{self.path}.good"), Path(f"{errors}.bad")
        with dropped_on_failure(good, bad):
            with self._partial.open("rb") as lines, good.open("wb") as fine, bad.open("wb") as bads:
                for line in lines:
                    (bads if former.is_failed(orjson.loads(line)) else fine).write(line)
            if bad.stat().st_size:
                publish(bad, errors)
            else:
                # As OpenAI has it: no failure, no file. One of an earlier run would be taken for
                # ours.
                bad.unlink()
                Path(errors).unlink(missing_ok=True)
            publish(good, self.path)
        self._partial.unlink()

    def close(self) -> None:
        """Close without completing: what was written waits to be resumed. Idempotent."""
        for file in (self._file, self._apart):
            if file is not None and not file.closed and file is not sys.stdout.buffer:
                with contextlib.suppress(OSError):  # a full disk was reported when it was met
                    file.close()

    def _open_stream(self, errors: str | None, *, again: bool) -> None:
        if again:
            msg = "a pipe, a device or standard output cannot be resumed; name a file"
            raise InvalidFileError(msg, path=self.path)
        with self._errors():
            # Appending, for it may be the file that a shell redirects to.
            is_stdout = self.path == STANDARD
            self._file = sys.stdout.buffer if is_stdout else Path(self.path).open("ab")  # noqa: SIM115
        if errors is not None:
            with self._errors(errors):
                self._apart = Path(f"{errors}.partial").open("wb")  # noqa: SIM115  `close` does

    def _open(
        self,
        source: str | None,
        identity: dict[str, object] | None,
        *,
        resume: bool,
        redo: Redo | None,
    ) -> None:
        self._file = former.lock(self._partial)
        if not resume and not redo:
            self._file.truncate(0)
        else:
            self._take_up(source, identity, redo)
        note = {
            "v": 1,
            "batch_id": str(self.batch_id),
            "input": identity,
            "rules": self.rules,
        }
        former.write_journal(self._journal, note)

    def _take_up(
        self, source: str | None, identity: dict[str, object] | None, redo: Redo | None
    ) -> None:
        note = former.read_journal(self._journal)
        is_same = note is not None and note.get("input") == identity
        # Other rows under the same names, or the same rows wanted anew, are other jobs.
        if note and is_same and not redo:
            self.batch_id = UUID(note["batch_id"])
        if note and is_same:
            former_rules = note.get("rules") or {}
            for name, value in self.rules.items():
                self.rules[name] = former_rules.get(name) if value is None else value
        questions = None
        if source is not None and identity is not None and not is_same:
            questions = former.questions_of(source)
        sieve = former.Sieve(redo, questions)
        begun = self._partial.stat().st_size > 0
        if not (begun and former.cut(self._partial, self._file, sieve)):
            sieve = former.Sieve(redo, questions)
            whole = [self.path, *([self._errors_path] if self._errors_path else ())]
            files = filter(_size, [str(self._partial)] if begun else whole)
            found = (line for file in files for line in former_lines(file))
            stay = (line for line in found if sieve.stays(line))
            self._file = former.replaced(self._partial, self._file, stay)
        self.kept = sieve.finish()

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
            known = not self._streams and self._partial.exists()
            raise InvalidFileError(msg + (safe if known else ""), path=path) from exc


def is_stream(path: str) -> bool:
    """Whether lines that were written there cannot be taken back: a pipe, a device, ``-``.

    Args:
        path: As given for an output.
    """
    if path == STANDARD or path.startswith(_STREAMS):
        return True
    file = Path(path)
    return file.exists() and not file.is_file() and not file.is_dir()


def check_outputs(path: str, errors: str | None, source: str | None) -> None:
    """Refuse outputs that cannot be written, before anything is started for them.

    Args:
        path: The output file, or ``-``.
        errors: The file for rows that failed.
        source: The input, which none of them may be.

    Raises:
        InvalidFileError: One is a folder, its folder is missing or not writable, or two are one.
    """
    if errors is not None and is_stream(errors):
        msg = "must be a file: rows that failed are parted from the others"
        raise InvalidFileError(msg, path=errors)
    taken = {} if source is None or source == STANDARD else {os.path.realpath(source): "the input"}
    for file, name in ((path, "the output"), (errors, "the file for errors")):
        if file is None or is_stream(file):
            continue
        _check_writable(file)
        for real in (os.path.realpath(file), os.path.realpath(f"{file}.partial")):
            if real in taken:
                msg = f"is {taken[real]} too, which would be lost; name another file"
                raise InvalidFileError(msg, path=file)
            taken[real] = name


def _check_writable(path: str) -> None:
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


def _size(path: str | None) -> int:
    return Path(path).stat().st_size if path is not None and Path(path).is_file() else 0
