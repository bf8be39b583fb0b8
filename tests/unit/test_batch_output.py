"""Outputs of batch runs: nothing is lost, nothing stands twice, and nothing else is overwritten."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from schema.errors import InvalidFileError
from schema.jobs import JobError, JobResult, JobState
from schema.openai_batch import BadLine, BatchLine, error_line, output_line
from workers import batch_former
from workers.batch_input import identity
from workers.batch_order import asked
from workers.batch_output import BatchOutput

URL = "/v1/chat/completions"


def rows(*names: str, **bodies: Any) -> list[dict[str, Any]]:
    """Return rows of an input; a body is what the row's name says unless told."""
    return [
        {
            "custom_id": name,
            "method": "POST",
            "url": URL,
            "body": bodies.get(name, {"say": name}),
        }
        for name in names
    ]


def write(path: Path, *found: dict[str, Any]) -> str:
    """Write an input."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def answered(row: dict[str, Any], *, fails: bool = False) -> bytes:
    """Return the line of a row that is answered."""
    result = JobResult(
        job_id=uuid4(),
        namespace="n",
        status=JobState.FAILED if fails else JobState.DONE,
        token=1,
        custom_id=row["custom_id"],
        body=None if fails else {"choices": []},
        error=JobError(type="EngineFailedError", message="broke") if fails else None,
        finished_at=datetime.now(UTC),
    )
    return output_line(result, asked=asked(row["url"], row["body"]))


def fill(output: BatchOutput, *lines: bytes) -> None:
    """Write lines, and end as a run that was killed does."""
    for line in lines:
        output.write(line)
    output.close()


def begun(source: str, path: Path, **options: Any) -> BatchOutput:
    """Begin an output, or go on with one."""
    return BatchOutput(str(path), source=source, identity=identity(source), **options)


def names_of(path: Path) -> list[str | None]:
    """Return the names in an output, in their order."""
    return [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize(
    ("output", "errors", "says"),
    [
        ("in", None, "is the input too, which would be lost"),
        ("link", None, "is the input too"),
        ("out", "in", "is the input too"),
        ("out", "out", "is the output too"),
        ("out", "out.partial", "is the output too"),
        ("out", "-", "must be a file"),
        ("-", "-", "must be a file"),
        ("nowhere/out", None, "its folder does not exist"),
    ],
)
def test_no_file_is_two_things_at_once(
    tmp_path: Path, output: str, errors: str | None, says: str
) -> None:
    source = write(tmp_path / "in", *rows("a"))
    before = Path(source).read_bytes()
    (tmp_path / "link").symlink_to(source)
    paths = [None if name is None else str(tmp_path / name) for name in (output, errors)]
    path, wrong = [
        "-" if name == "-" else path for name, path in zip((output, errors), paths, strict=True)
    ]
    with pytest.raises(InvalidFileError, match=says):
        BatchOutput(str(path), errors=wrong, source=source)
    assert Path(source).read_bytes() == before


def test_what_is_left_of_a_run_is_not_taken_for_the_input_of_the_next(tmp_path: Path) -> None:
    source = write(tmp_path / "out.partial", *rows("a"))
    with pytest.raises(InvalidFileError, match="is the input too"):
        BatchOutput(str(tmp_path / "out"), source=source)
    assert Path(source).stat().st_size


def test_a_pipe_is_written_and_never_replaced(tmp_path: Path) -> None:
    """As `/dev/null` and `/dev/stdout` are, which a rename would replace on the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    line = answered(rows("a")[0])
    output = BatchOutput(str(pipe))
    output.write(line)
    output.complete()
    output.close()
    reader.join(30)
    assert read == [line]
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    with pytest.raises(InvalidFileError, match="cannot be resumed"):
        BatchOutput(str(pipe), resume=True)


def test_a_run_killed_while_it_tidies_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = rows("a", "b", "c")
    source, path = write(tmp_path / "in", a, b, c), tmp_path / "out"
    bad = error_line(BadLine(number=2, message="line 2: is not JSON"))
    fill(begun(source, path), answered(a), bad, answered(b), answered(c))
    before = (tmp_path / "out.partial").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _killed)
        with pytest.raises(KeyboardInterrupt):
            begun(source, path, resume=True)
    assert (tmp_path / "out.partial").read_bytes() == before
    output = begun(source, path, resume=True)
    assert output.kept.answered == 3
    output.complete()
    assert names_of(path) == ["a", "b", "c"]


def _killed(_: int) -> None:
    raise KeyboardInterrupt


def test_a_finished_output_is_taken_up_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rows(*(f"r{n}" for n in range(50)))
    source, path = write(tmp_path / "in", *found), tmp_path / "out"
    first = begun(source, path)
    fill(first, *(answered(row, fails=row["custom_id"] == "r7") for row in found))
    begun(source, path, resume=True).complete()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", _killed)
        with pytest.raises(KeyboardInterrupt):
            begun(source, path, redo="failed")
    # What was copied so far is no output of an interrupted run: the other rows would run again.
    assert begun(source, path, redo="failed").kept.answered == 49


def test_only_the_torn_end_is_cut_off_in_place(tmp_path: Path) -> None:
    a, b = rows("a", "b")
    source, path = write(tmp_path / "in", a, b), tmp_path / "out"
    fill(begun(source, path), answered(a), answered(b)[:-20])
    inode = (tmp_path / "out.partial").stat().st_ino
    first = begun(source, path, resume=True)
    assert first.kept.answered == 1
    # A disk that was full has no room for a copy.
    assert (tmp_path / "out.partial").stat().st_ino == inode
    assert (tmp_path / "out.partial").read_bytes().count(b"\n") == 1


def test_an_interrupted_run_goes_on_as_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = write(tmp_path / "in", *rows("a")), tmp_path / "out"
    first = begun(source, path)
    first.close()
    # Killed while it notes what it is: the note is the old one or the new one.
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *_: _killed(0))
        with pytest.raises(KeyboardInterrupt):
            batch_former.write_journal(Path(f"{path}.partial.json"), {"batch_id": "another"})
    assert begun(source, path, resume=True).batch_id == first.batch_id


def test_an_interrupted_run_goes_on_by_its_own_rules_unless_told_otherwise(tmp_path: Path) -> None:
    source, path = write(tmp_path / "in", *rows("a")), tmp_path / "out"
    begun(source, path, rules={"max_tokens": 9, "model": "m"}).close()
    again = begun(source, path, resume=True, rules={"max_tokens": None, "model": "n"})
    assert again.rules == {"max_tokens": 9, "model": "n"}
    again.close()
    assert begun(source, path, rules={"max_tokens": None}).rules == {"max_tokens": None}


def test_an_order_that_was_asked_for_holds_across_interruptions(tmp_path: Path) -> None:
    a, b, c, d = rows("a", "b", "c", "d")
    source, path = write(tmp_path / "in", a, b, c, d), tmp_path / "out"
    bad = BadLine(number=3, message="line 3: is not JSON")
    removed = answered(rows("of another input")[0])
    fill(begun(source, path, ordered=True), answered(d), removed, answered(b), error_line(bad))
    output = begun(source, path, ordered=True, resume=True)
    parsed: list[BatchLine | BadLine] = [
        BatchLine(number=n, custom_id=row["custom_id"], url=URL, body=row["body"])
        for n, row in ((1, a), (2, b), (4, c), (5, d))
    ]
    parsed.insert(2, bad)
    for line in parsed:
        output.expect(line)
    late = BadLine(number=4, message="line 4: body: is too long", custom_id="c")
    for new in (error_line(late), error_line(bad), answered(a)):
        output.write(new)
    output.complete()
    assert names_of(path) == ["a", "b", None, "c", "d", "of another input"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_row_that_asks_something_else_by_now_is_answered_anew(
    tmp_path: Path, finished: bool
) -> None:
    source, path = write(tmp_path / "in", *rows("a", "b")), tmp_path / "out"
    output = begun(source, path)
    for row in rows("a", "b"):
        output.write(answered(row))
    if finished:
        output.complete()
    output.close()
    write(Path(source), *rows("a", "b", "c", b={"say": "something else"}))
    again = begun(source, path, resume=True)
    assert ("a" in again.kept, "b" in again.kept) == (True, False)
    assert again.kept.changed == 1


def test_there_must_be_something_to_do_anew(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *rows("a"))
    with pytest.raises(InvalidFileError, match="holds no answers of an earlier run"):
        begun(source, tmp_path / "out", redo="failed")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_does_not_fit_on_the_disk_leaves_no_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    source = write(tmp_path / "in", *rows("a"))
    output = BatchOutput(
        str(tmp_path / "out.gz"), errors=str(tmp_path / "wrong.jsonl"), source=source
    )
    output.write(answered(rows("a")[0]))
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(InvalidFileError, match=r"No space left.*partial is safe, and --resume"):
        output.complete()
    output.close()
    left = {"in", "out.gz.partial", "out.gz.partial.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_finished_output_that_is_damaged_is_not_resumed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", *rows("a"))
    (tmp_path / "out.gz").write_bytes(b"no gzip at all")
    with pytest.raises(InvalidFileError, match=r"out\.gz: broke off"):
        begun(source, tmp_path / "out.gz", resume=True)
