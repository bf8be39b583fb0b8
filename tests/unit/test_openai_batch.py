"""Batch files: every line is a request or says what is wrong with it."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.jobs import JobError, JobResult, JobState
from schema.openai_batch import (
    BadLine,
    BatchLine,
    BatchParser,
    error_line,
    output_line,
    read_lines,
)

URL = "/v1/chat/completions"


def line(**changes: Any) -> bytes:
    """Return a valid line, changed as told; None leaves a field out."""
    value = {"custom_id": "a", "method": "POST", "url": URL, "body": {"x": 1}, **changes}
    return json.dumps({key: item for key, item in value.items() if item is not None}).encode()


def parse(raw: bytes, **options: Any) -> list[BatchLine | BadLine]:
    """Return what a file holds."""
    parser = BatchParser(**options)
    return [parser.parse(*item) for item in read_lines(io.BytesIO(raw), **options)]


def test_a_request_is_read():
    size = len(line())
    assert parse(line()) == [BatchLine(number=1, custom_id="a", url=URL, body={"x": 1}, size=size)]


def test_blank_lines_marks_and_ends_of_other_systems_are_no_matter():
    raw = b"\xef\xbb\xbf" + line() + b"\r\n\n   \n" + line(custom_id="b")
    assert [(item.number, item.custom_id) for item in parse(raw)] == [(1, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("raw", "says", "param"),
    [
        (b"{", "is not JSON", None),
        (b"\xff\xfe", "is not valid UTF-8 (invalid start byte at byte 0)", None),
        (b'{"custom_id": "\xe9"}', "is not valid UTF-8", None),
        (b'{"custom_id": "a\x00"}', "holds a NUL byte at position 16", None),
        (b'{"custom_id": "\\ud800"}', "is not JSON", None),
        (b"\x1f\x8b\x08\x00", "compressed by gzip; give it a name that ends in .gz", None),
        (b"\x28\xb5\x2f\xfd\x00", "compressed by zstd", None),
        (b"PAR1\x15", "is a Parquet file; give it a name that ends in .parquet", None),
        (b'{"custom_id": NaN}', "is not JSON", None),
        (b"[1]", "must be a JSON object, not [1]", None),
        (b'"text"', "must be a JSON object", None),
        (b"null", "must be a JSON object", None),
        (b"[" * 100_000, "is not JSON", None),
        (line(custom_id=None), "the field custom_id is missing", "custom_id"),
        (line(custom_id=None, customid="a"), "is it written as 'customid'?", "custom_id"),
        (line(custom_id=7), "custom_id must be text of 1 to 512 characters, not 7", "custom_id"),
        (line(custom_id=""), "custom_id must be text", "custom_id"),
        (line(custom_id="x" * 513), "custom_id must be text", "custom_id"),
        (line(custom_id="a\x00"), "custom_id holds a NUL character", "custom_id"),
        (line(method=None), "the field method is missing", "method"),
        (line(method="GET"), "method must be 'POST', not 'GET'", "method"),
        (line(method="post"), "method must be 'POST'", "method"),
        (line(url=None), "the field url is missing", "url"),
        (line(url="/v1/chat/completion"), "did you mean '/v1/chat/completions'?", "url"),
        (line(url=[]), "url must be one of", "url"),
        (line(body=None), "the field body is missing", "body"),
        (line(body="text"), "body must be an object, not 'text'", "body"),
        (line(body=[]), "body must be an object", "body"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(raw: bytes, says: str, param: str | None):
    good, bad, after = parse(line(custom_id="before") + b"\n" + raw + b"\n" + line(custom_id="z"))
    assert isinstance(good, BatchLine)
    assert isinstance(after, BatchLine)
    assert isinstance(bad, BadLine)
    assert bad.message.startswith("line 2: ")
    assert says in bad.message
    assert bad.param == param


def test_a_name_may_come_once():
    first, second, third = parse(b"\n".join([line(), line(), line(custom_id="b")]))
    assert isinstance(first, BatchLine)
    assert isinstance(third, BatchLine)
    assert isinstance(second, BadLine)
    assert (second.custom_id, second.param) == ("a", "custom_id")
    assert "line 2: custom_id 'a' came before" in second.message


def test_a_line_without_end_is_passed_over_and_not_kept():
    long = line(custom_id="long", body={"x": "y" * 5000})
    raw = b"\n".join([line(), long, line(custom_id="b"), long])
    kinds = [type(item) for item in parse(raw, max_bytes=1000)]
    assert kinds == [BatchLine, BadLine, BatchLine, BadLine]
    assert "is longer than 1,000 bytes" in error_text(parse(raw, max_bytes=1000)[1])


def error_text(item: BatchLine | BadLine) -> str:
    """Return the message of a bad line."""
    assert isinstance(item, BadLine)
    return item.message


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_read_or_refused(raw: bytes):
    for item in parse(raw):
        assert isinstance(item, (BatchLine, BadLine))


@settings(deadline=None)
@given(st.lists(st.integers(min_value=0, max_value=60)))
def test_lines_are_found_whatever_their_length(lengths: list[int]):
    raw = b"\n".join(b"x" * length for length in lengths)
    found = list(read_lines(io.BytesIO(raw), max_bytes=30))
    expected = [
        (number, b"x" * length if length <= 30 else None)
        for number, length in enumerate(lengths, start=1)
        if length
    ]
    assert found == expected


JOB = UUID(int=7)


def result(status: JobState = JobState.DONE, **more: Any) -> JobResult:
    """Return an outcome."""
    return JobResult(
        job_id=JOB,
        namespace="n",
        status=status,
        token=1,
        custom_id="a",
        finished_at=datetime.now(UTC),
        **more,
    )


def test_an_answer_has_the_form_of_vllm():
    metadata = {"provenance": "exact", "cached": True, "similar": [1], "similarity": None}
    raw = output_line(result(body={"choices": []}, metadata=metadata))
    assert raw.endswith(b"\n")
    assert json.loads(raw) == {
        "id": f"promptmill-{JOB.hex}",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": f"promptmill-batch-{JOB.hex}",
            "body": {"choices": []},
        },
        "error": None,
        "promptmill": {"job_id": str(JOB), "provenance": "exact", "cached": True},
    }


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (result(JobState.CANCELLED), 499, "the job was cancelled"),
        (result(JobState.EXPIRED), 408, "the job was expired"),
        (result(JobState.FAILED), 500, "the job was failed"),
        (
            result(JobState.FAILED, error=JobError(type="EngineFailedError", message="broke")),
            500,
            "broke",
        ),
        (
            result(JobState.FAILED, error=JobError(type="InvalidRequestError", message="bad")),
            400,
            "bad",
        ),
        (
            result(
                JobState.FAILED,
                error=JobError(
                    type="NotFoundError",
                    message="x",
                    body={"error": {"message": "no such model", "code": 404}},
                ),
            ),
            404,
            "no such model",
        ),
    ],
)
def test_a_failure_says_why(outcome: JobResult, code: int, message: str):
    value = json.loads(output_line(outcome))
    assert value["response"]["status_code"] == code
    assert value["response"]["body"] == {"error": value["error"]["error"]}
    assert value["error"]["error"]["message"] == message
    assert value["error"]["message"] == message
    assert value["error"]["code"] == value["error"]["error"].get("type")


def test_a_line_says_what_its_answer_cost_and_whose_it_was():
    metadata = {
        "provenance": "generated",
        "cached": False,
        "answer_id": "one",
        "tokens": {"prompt_tokens": 3, "completion_tokens": 4},
        "engine_s": 0.5,
    }
    first = json.loads(output_line(result(body={}, metadata=metadata)))
    twin = json.loads(output_line(result(body={}, metadata=metadata), custom_id="b", twin=True))
    assert first["promptmill"] == {"job_id": str(JOB), **metadata}
    assert twin["custom_id"] == "b"
    assert twin["promptmill"]["provenance"] == "coalesced"
    assert twin["promptmill"]["source_answer_id"] == "one"


def test_a_bad_line_gets_an_answer_too():
    bad = BadLine(number=3, message="line 3: is not JSON", custom_id=None, param=None)
    value = json.loads(error_line(bad))
    assert value["custom_id"] is None
    assert value["response"]["status_code"] == 400
    assert value["error"]["error"]["message"] == "line 3: is not JSON"
    assert value["promptmill"] == {"line": 3}
