"""`SchemaChecker`: checks that do not end by themselves, and processes that do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from schema.errors import InvalidRequestError, ServiceError
from workers.json_schemas import check_schema
from workers.schema_checker import SchemaChecker, _spawn

_BOUND_S = 1.0  # a process that has just started checks its first schema by the metaschema in it
_DEADLINE_S = 60.0
_COSTLY = {"pattern": "^(a|a)*$"}
_COSTLY_TEXT = '"' + "a" * 60 + '!"'
_OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("schema", "text", "says"),
    [
        ({"items": {"pattern": "^(a|a)*$"}}, '["' + "a" * 60 + '!"]', r"pattern.*\^\(a\|a\)\*\$"),
        ({"patternProperties": {"^(b|b)*$": {}}}, '{"' + "b" * 60 + '!": 1}', r"\^\(b\|b\)\*\$"),
        (
            {
                "$defs": {
                    str(n): {"anyOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} if n < 60 else False
                    for n in range(61)
                },
                "$ref": "#/$defs/0",
            },
            "1",
            "is too costly",
        ),
    ],
    ids=["pattern", "property names", "references"],
)
async def test_a_check_that_would_take_for_ever_ends_and_nothing_waits_for_it(
    schema: dict[str, Any], text: str, says: str
) -> None:
    checker = SchemaChecker(limit_s=_BOUND_S)
    try:
        check = asyncio.create_task(checker.faults(schema, [text], namespace="n"))
        looks = 0
        while not check.done():
            looks += 1
            await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequestError, match=says) as refused:
            check.result()
        assert refused.value.field == "schema"
        assert looks > 5, "the loop stood still"
        # The next one is served again, and the costly schema is known.
        assert await checker.faults(_OBJECT, ["{}"], namespace="n") == [None]
        process = checker._child
        with pytest.raises(InvalidRequestError, match=says):
            await checker.faults(schema, [text], namespace="n")
        assert checker._child is process, "it was checked again"
        # It is so with that tenant's answers: another's are looked at.
        assert await checker.faults(schema, ["no JSON"], namespace="other") != [None]
    finally:
        await checker.aclose()


@pytest.fixture
async def patient() -> AsyncIterator[SchemaChecker]:
    """One that a costly check keeps busy until something else ends it."""
    made = SchemaChecker(limit_s=2 * _DEADLINE_S)
    yield made
    await made.aclose()


_WORKER = f"""
import asyncio
from workers.schema_checker import SchemaChecker

async def work():
    checker = SchemaChecker(limit_s=600)
    check = asyncio.create_task(checker.faults({_COSTLY!r}, [{_COSTLY_TEXT!r}], namespace="n"))
    while checker._child is None:
        await asyncio.sleep(0.01)
    print(checker._child.process.pid, flush=True)
    await check

asyncio.run(work())
"""


async def process_of(checker: SchemaChecker) -> subprocess.Popen[bytes]:
    async with asyncio.timeout(_DEADLINE_S):
        while checker._child is None:
            await asyncio.sleep(0.01)
    return checker._child.process


async def test_a_process_that_stands_still_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = SchemaChecker()
    try:
        assert await checker.faults(_OBJECT, ["{}"], namespace="n") == [None]
        process = await process_of(checker)
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(_DEADLINE_S / 2):
            with monkeypatch.context() as changed:
                changed.setattr("workers.schema_checker._PATIENCE_S", 0.5)
                with pytest.raises(ServiceError, match=r"said nothing for 0\.5 s"):
                    await checker.faults(_OBJECT, ["{}"], namespace="n")
        assert process.poll() is not None
        assert await checker.faults(_OBJECT, ["{}"], namespace="n") == [None]
    finally:
        await checker.aclose()


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$ref": "http://[x#a"}, "ValueError"),
        (
            {
                "$schema": "http://json-schema.org/draft-04/schema#",
                "patternProperties": {"(": {}},
            },
            "unterminated subpattern",
        ),
    ],
    ids=["reference", "regular expression"],
)
async def test_whatever_a_schema_makes_the_validator_raise_is_a_refusal(
    schema: dict[str, Any], says: str, patient: SchemaChecker
) -> None:
    check_schema(schema)
    with pytest.raises(InvalidRequestError, match=f"cannot be checked by.*{says}") as refused:
        await patient.faults(schema, ['{"a": 1}'], namespace="n")
    assert refused.value.field == "schema"
    process = await process_of(patient)
    assert await patient.faults(_OBJECT, ["{}"], namespace="n") == [None]
    assert await process_of(patient) is process


async def test_a_reply_that_cannot_be_read_is_no_fault_of_the_caller(
    patient: SchemaChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr("workers.schema_checker._REPLY_BYTES", 9)
        with pytest.raises(ServiceError, match="cannot be read"):
            await patient.faults(_OBJECT, ["{}"] * 9, namespace="n")
    assert await patient.faults(_OBJECT, ["{}"], namespace="n") == [None]


@pytest.fixture
def profiled_elsewhere() -> Iterator[None]:
    """A worker whose SIGPROF was ignored and blocked by whoever started it."""
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGPROF, before)


@pytest.mark.usefixtures("profiled_elsewhere")
async def test_the_bound_holds_whatever_was_inherited() -> None:
    checker = SchemaChecker(limit_s=_BOUND_S)
    try:
        with pytest.raises(InvalidRequestError, match="too costly"):
            await checker.faults(_COSTLY, [_COSTLY_TEXT], namespace="n")
    finally:
        await checker.aclose()


async def test_a_check_may_not_take_all_memory() -> None:
    checker = SchemaChecker(limit_s=_DEADLINE_S, memory_bytes=2**25)
    strings = {"anyOf": [{"items": {"type": "string"}}]}  # it gathers what is wrong with each
    try:
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match=r"is too costly.* 32 MiB of memory"):
                await checker.faults(strings, [f"[{'1,' * 200_000}1]"], namespace="n")
        assert await checker.faults(_OBJECT, ["{}"], namespace="n") == [None]
    finally:
        await checker.aclose()


async def test_a_check_dies_with_its_worker() -> None:
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _WORKER, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert worker.stdout is not None
    assert worker.stderr is not None
    try:
        async with asyncio.timeout(_DEADLINE_S):
            checks = int(await worker.stdout.readline())
            worker.kill()
            assert await worker.stderr.read() == b""  # its process writes there too
    finally:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(checks, signal.SIGKILL)


async def test_a_cancelled_check_takes_its_process_along(patient: SchemaChecker) -> None:
    check = asyncio.create_task(patient.faults(_COSTLY, [_COSTLY_TEXT], namespace="n"))
    process = await process_of(patient)
    check.cancel()
    with pytest.raises(asyncio.CancelledError):
        await check
    assert process.poll() is not None
    assert await patient.faults(_COSTLY, ['"aa"'], namespace="n") == [None]


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that a checker starts."""
    found: list[subprocess.Popen[bytes]] = []

    def spawn(*how: Any) -> subprocess.Popen[bytes]:
        found.append(_spawn(*how))
        return found[-1]

    monkeypatch.setattr("workers.schema_checker._spawn", spawn)
    return found


async def test_being_cancelled_at_any_moment_leaves_no_process(
    patient: SchemaChecker, spawned: list[subprocess.Popen[bytes]]
) -> None:
    turns = 0
    while len(spawned) < 3:
        check = asyncio.create_task(patient.faults(_COSTLY, [_COSTLY_TEXT], namespace="n"))
        for _ in range(turns):
            await asyncio.sleep(0)
        check.cancel()
        with pytest.raises(asyncio.CancelledError):
            await check
        assert all(process.returncode is not None for process in spawned), turns
        turns += 1
        assert turns < 100


async def test_closing_ends_the_check_and_those_that_wait_for_it(
    patient: SchemaChecker, spawned: list[subprocess.Popen[bytes]]
) -> None:
    checks = [
        asyncio.create_task(patient.faults(_COSTLY, [text], namespace="n"))
        for text in (_COSTLY_TEXT, '"aa"')
    ]
    await process_of(patient)
    await patient.aclose()
    async with asyncio.timeout(_DEADLINE_S):
        ended = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(each) for each in ended] == [ServiceError, ServiceError]
    assert {str(each) for each in ended} == {"the checker of answers was closed"}
    assert [process.returncode for process in spawned] == [-signal.SIGKILL]


async def test_what_cannot_be_started_leaves_nothing_open(
    patient: SchemaChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> None:
        raise BlockingIOError

    made: list[socket.socket] = []
    pair = socket.socketpair

    def remembered() -> list[socket.socket]:
        made.extend(pair())
        return made

    with monkeypatch.context() as changed:
        changed.setattr("workers.schema_checker._spawn", refuse)
        changed.setattr(socket, "socketpair", remembered)
        with pytest.raises(ServiceError, match="could not be started"):
            await patient.faults(_OBJECT, ["{}"], namespace="n")
    await asyncio.sleep(0)  # the transport closes its socket in the loop's next turn
    assert [each.fileno() for each in made] == [-1, -1]
    assert await patient.faults(_OBJECT, ["{}"], namespace="n") == [None]


async def test_a_process_that_died_otherwise_is_no_fault_of_the_schema(
    patient: SchemaChecker,
) -> None:
    check = asyncio.create_task(patient.faults(_COSTLY, [_COSTLY_TEXT], namespace="n"))
    (await process_of(patient)).kill()
    with pytest.raises(ServiceError, match="ended with status -9"):
        await check
    assert await patient.faults(_COSTLY, ['"aa"'], namespace="n") == [None]
