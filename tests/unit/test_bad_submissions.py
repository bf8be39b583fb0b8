"""What a caller may get wrong: each is refused by name, before any queue."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.errors import InvalidRequestError
from schema.jobs import JobSpec
from workers.submission import SubmitDefaults, build_spec, build_specs

DEEP: list[Any] = []
for _ in range(5_000):
    DEEP = [DEEP]

# What is wrong, the prompt, the options, and what the error names.
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (None, {}, "prompt"),
    (5, {}, "prompt"),
    (b"bytes", {}, "prompt"),
    (["list"], {}, "prompt"),
    ("half \ud800", {}, "prompt"),
    ("x" * 101, {}, "prompt"),
    ("ü" * 60, {}, "prompt"),
    ("x", {"promt": "y"}, "promt"),
    ("x", {"temperature": 1}, "temperature"),
    ("x", {"messages": [{"role": "user", "content": "y"}]}, "messages"),
    ("x", {"body": {}}, "body"),
    ("x", {"url": "/v1/embeddings"}, "url"),
    (None, {"messages": []}, "messages"),
    (None, {"messages": "hi"}, "messages"),
    (None, {"messages": ["hi"]}, "messages[0]"),
    (None, {"messages": [{"content": "no role"}]}, "messages[0]"),
    (None, {"messages": [{"role": 1, "content": "y"}]}, "messages[0]"),
    (None, {"body": []}, "body"),
    (None, {"body": "{}"}, "body"),
    (None, {"body": {"a": float("nan")}}, "body.a"),
    (None, {"body": {"a": "x" * 200}}, "body"),
    (None, {"body": {"a": 1}, "url": 5}, "url"),
    (None, {"body": {"a": 1}, "sampling": {}}, "sampling"),
    ("x", {"sampling": []}, "sampling"),
    ("x", {"sampling": "hot"}, "sampling"),
    ("x", {"sampling": {"temprature": 1}}, "sampling.temprature"),
    ("x", {"sampling": {"temperature": -1}}, "sampling.temperature"),
    ("x", {"sampling": {"temperature": "1"}}, "sampling.temperature"),
    ("x", {"sampling": {"temperature": float("inf")}}, "sampling.temperature"),
    ("x", {"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
    ("x", {"sampling": {"max_tokens": 1.5}}, "sampling.max_tokens"),
    ("x", {"sampling": {"top_p": 1.5}}, "sampling.top_p"),
    ("x", {"sampling": {"n": 0}}, "sampling.n"),
    ("x", {"sampling": {"seed": 2**70}}, "sampling"),
    ("x", {"namespace": "a:b"}, "namespace"),
    ("x", {"namespace": ""}, "namespace"),
    ("x", {"namespace": "a\n"}, "namespace"),
    ("x", {"namespace": 5}, "namespace"),
    ("x", {"model": "a b"}, "model"),
    ("x", {"channel": "*"}, "channel"),
    ("x", {"channel": "y" * 200}, "channel"),
    ("x", {"priority": 10}, "priority"),
    ("x", {"priority": -1}, "priority"),
    ("x", {"priority": "high"}, "priority"),
    ("x", {"priority": True}, "priority"),
    ("x", {"reuse": "sometimes"}, "reuse"),
    ("x", {"threshold": 2.0}, "threshold"),
    ("x", {"ttl_s": -1}, "ttl_s"),
    ("x", {"ttl_s": float("nan")}, "ttl_s"),
    ("x", {"tags": "one"}, "tags"),
    ("x", {"tags": [1]}, "tags"),
    ("x", {"stream": "yes"}, "stream"),
    ("x", {"max_attempts": 0}, "max_attempts"),
    ("x", {"deadline": "tomorrow"}, "deadline"),
    ("x", {"deadline": datetime(2030, 1, 1)}, "deadline"),  # noqa: DTZ001  that is the fault
    ("x", {"idempotency_key": ""}, "idempotency_key"),
    ("x", {"idempotency_key": 5}, "idempotency_key"),
    ("x", {"batch_id": "no-uuid"}, "batch_id"),
    ("x", {"row": -1}, "row"),
    ("x", {"id": "no-uuid"}, "id"),
    (None, {"body": {"a": DEEP}}, "body"),
]


@pytest.mark.parametrize(("prompt", "options", "field"), WRONG, ids=range(len(WRONG)))
def test_each_gets_its_own_error(prompt: Any, options: dict[str, Any], field: str):
    with pytest.raises(InvalidRequestError) as raised:
        build_spec(prompt, options, SubmitDefaults(max_prompt_bytes=100))
    assert field.split(".", maxsplit=1)[0] in str(raised.value.field)
    assert len(str(raised.value)) < 1000


def test_one_of_many_is_named_by_its_place():
    with pytest.raises(InvalidRequestError, match=r"requests\[1\]"):
        list(build_specs(["a", {"prompt": "b", "priority": 99}], {}, SubmitDefaults()))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    ["messages", "body", "url", "sampling", "namespace", "model", "channel", "priority", "reuse",
     "threshold", "ttl_s", "tags", "stream", "deadline", "row", "id", "batch_id", "custom_id"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(prompt=ANYTHING, options=st.dictionaries(NAMES, ANYTHING, max_size=4))
def test_anything_is_a_job_or_a_refusal(prompt: Any, options: dict[str, Any]):
    try:
        spec = build_spec(prompt, options)
    except InvalidRequestError:
        pass
    else:
        assert isinstance(spec, JobSpec)
        assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
