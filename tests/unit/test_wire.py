"""The message on the queue: what is written can be read, and what is wrong is said."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any
from uuid import RFC_4122, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema import names, wire
from schema.errors import MessageFormatError
from schema.jobs import JobSpec, OpenAIRequest, PromptRequest

ROUTE = wire.Route(namespace="acme", model="tiny", priority=3)


def spec(prompt: str = "Why?", **more: Any) -> JobSpec:
    """Return a valid job."""
    return JobSpec(namespace="acme", request=PromptRequest(prompt=prompt), **more)


def header(**more: Any) -> dict[str, Any]:
    """Return a valid header, changed as told."""
    return {"v": 1, "namespace": "acme", "sent_at": 1.5, "ids": [str(uuid4())], **more}


def sent(message: wire.JobMessage) -> dict[str, Any]:
    """Return the header as a worker sees it."""
    return json.loads(wire.encode(message, ROUTE))["headers"][names.JOBS_HEADER]


def test_ids_come_back():
    ids = tuple(uuid4() for _ in range(3))
    message = wire.JobMessage(namespace="acme", sent_at=12.5, ids=ids)
    assert wire.decode(sent(message)) == message


def test_full_jobs_come_back():
    chat = OpenAIRequest(body={"messages": [{"role": "user", "content": "Ünï\U0001f600"}]})
    jobs = (spec(priority=2, custom_id="a"), JobSpec(namespace="acme", request=chat))
    message = wire.JobMessage(namespace="acme", sent_at=12.5, jobs=jobs)
    assert wire.decode(sent(message)) == message


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda text: text.strip() and "\x00" not in text))
def test_any_text_survives(text: str):
    message = wire.JobMessage(namespace="acme", sent_at=0.0, jobs=(spec(f"> {text}"),))
    assert wire.decode(sent(message)).jobs[0].request == PromptRequest(prompt=f"> {text}")


def test_the_envelope_is_one_that_our_workers_accept():
    envelope = pytest.importorskip("workers.envelope")
    item = wire.encode(wire.JobMessage(namespace="acme", sent_at=0.0, jobs=(spec(),)), ROUTE)
    envelope.check_item(item, ROUTE.queue, max_bytes=len(item))


def test_prompts_stand_in_the_header_alone():
    item = json.loads(
        wire.encode(wire.JobMessage(namespace="acme", sent_at=0.0, jobs=(spec("secret"),)), ROUTE)
    )
    assert "secret" in json.dumps(item["headers"].pop(names.JOBS_HEADER))
    assert "secret" not in json.dumps(item)


def test_a_message_holds_something_and_not_everything():
    for message in (
        wire.JobMessage(namespace="acme", sent_at=0.0),
        wire.JobMessage(namespace="acme", sent_at=0.0, ids=(uuid4(),), jobs=(spec(),)),
        wire.JobMessage(namespace="acme", sent_at=0.0, ids=(uuid4(),) * 4097),
    ):
        with pytest.raises(ValueError, match="1 to 4096"):
            wire.encode(message, ROUTE)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        ("text", "must be an object"),
        (header(v=2), "version 2 cannot be read"),
        (header(v=True), "version True cannot be read"),
        (header(v=None), "version None cannot be read"),
        (header(namespace="a:b"), "namespace must match"),
        (header(namespace=None), "namespace must match"),
        (header(sent_at="now"), "sent_at must be a Unix time"),
        (header(sent_at=True), "sent_at must be a Unix time"),
        (header(sent_at=math.nan), "sent_at must be a Unix time"),
        (header(sent_at=-1e300), "sent_at must be a Unix time"),  # no calendar has that day
        (header(sent_at=10**400), "sent_at must be a Unix time"),  # no float is so large
        (header(jobs=[]), "exactly one of"),
        ({"v": 1, "namespace": "acme", "sent_at": 1}, "exactly one of"),
        (header(ids=[]), "1 to 4096 items, not 0"),
        (header(ids=["x"] * 4097), "1 to 4096 items, not 4097"),
        (header(ids="abc"), "ids must be a list"),
        (header(ids=["abc"]), "ids must hold UUIDs, not 'abc'"),
        (header(ids=[7]), "ids must hold UUIDs, not 7"),
    ],
)
def test_a_wrong_message_is_refused(wrong: object, says: str):
    with pytest.raises(MessageFormatError, match=says):
        wire.decode(wrong)


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: (
    st.lists(inner) | st.dictionaries(
        st.sampled_from(["v", "namespace", "sent_at", "ids", "jobs"]) | st.text(), inner
    )
)))  # fmt: skip
def test_any_json_is_read_or_refused(value: object):
    with contextlib.suppress(MessageFormatError):
        wire.decode(value)


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (7, "job"),
        ({}, "request: is required"),
        ({"request": {"kind": "prompt", "prompt": ""}}, "prompt: is empty"),
        ({"request": {"kind": "prompt", "prompt": "a\x00"}}, "NUL"),
        ({"request": {"kind": "prompt", "prompt": "a\ud800"}}, "job: is not JSON"),
        ({"request": {"kind": "prompt", "prompt": "a", "sampling": {"n": True}}}, "sampling.n"),
        ({"request": {"kind": "prompt", "prompt": "a", "sampling": {"top_p": "1"}}}, "top_p"),
        ({"request": {"kind": "prompt", "prompt": "a"}, "namespace": "other"}, "namespace"),
        ({"request": {"kind": "openai", "body": {"x": math.inf}}}, "finite"),
        ({"request": {"kind": "openai", "url": "/v2/nope", "body": {}}}, "url: is not an endpoint"),
        ({"request": {"kind": "other"}}, "neither 'prompt' nor 'openai'"),
        ({"request": {"kind": "prompt", "prompt": "a"}, "prority": 1}, "did you mean 'priority'"),
        (
            {"request": {"kind": "prompt", "prompt": "a"}, "idempotency_key": "k"},
            f"id: must be {names.job_id_for('acme', 'k')}",
        ),
    ],
)
def test_one_bad_job_does_not_take_the_others_along(job: Any, says: str):
    job_id = uuid4()
    named = {"id": str(job_id), "channel": "mine", **job} if isinstance(job, dict) else job
    good = json.loads(spec().model_dump_json())
    message = wire.decode({"v": 1, "namespace": "acme", "sent_at": 1, "jobs": [named, good]})
    assert len(message.jobs) == 1
    (refused,) = message.refused
    assert says in str(refused.error)
    if isinstance(job, dict):
        assert (refused.id, refused.channel) == (job_id, "mine")
    else:
        assert (refused.id, refused.channel) == (None, "default")


def test_a_job_may_leave_out_what_has_a_default():
    request = {"kind": "prompt", "prompt": "Why?"}
    jobs = [{"request": request}, {"request": request, "idempotency_key": "k"}]
    message = wire.decode({"v": 1, "namespace": "acme", "sent_at": 1, "jobs": jobs})
    assert message.jobs[0].namespace == "acme"
    assert message.jobs[1].id == names.job_id_for("acme", "k")


def test_jobs_are_grouped_by_what_a_message_shares():
    jobs = [spec(priority=index % 2, model=("a", None)[index % 3 == 0]) for index in range(60)]
    groups = list(wire.grouped(jobs, model="tiny", limit=8))
    assert sorted(job.id for _, group in groups for job in group) == sorted(j.id for j in jobs)
    for route, group in groups:
        assert 0 < len(group) <= 8
        assert {(job.model or "tiny", job.priority) for job in group} == {
            (route.model, route.priority)
        }


def test_large_jobs_get_messages_of_their_own():
    jobs = [spec("x" * 600), spec("y" * 600), spec("z" * 2000)]
    sizes = [len(group) for _, group in wire.grouped(jobs, model="m", limit=64, max_bytes=1000)]
    assert sizes == [1, 1, 1]


def test_the_list_is_the_one_that_kombu_reads():
    from kombu.transport.redis import Channel

    for priority in names.PRIORITIES:
        route = wire.Route(namespace="acme", model="tiny", priority=priority)
        channel = Channel.__new__(Channel)
        channel.priority_steps = list(names.PRIORITIES)
        assert channel._q_for_pri(route.queue, priority) == route.key


def test_ids_of_new_jobs_are_ordered_by_time_and_unlike() -> None:
    before = time.time_ns() // 1_000_000
    ids = [names.new_job_id() for _ in range(2_000)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == len(ids)
    assert {(one.version, one.variant) for one in ids} == {(7, RFC_4122)}
    assert [one.int >> 64 for one in ids] == sorted(one.int >> 64 for one in ids)
    assert all(before <= one.int >> 80 <= after for one in ids)
