"""Queue items that a seeded generator makes: noise, JSON of wrong shapes, and broken messages."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from schema import names, wire
from schema.jobs import JobSpec, PromptRequest

_DEEP: Any = "deep"
for _ in range(200):
    _DEEP = [_DEEP]

#: What a part of a message is replaced with.
_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**200,
    10**400,
    1.5,
    -1e300,
    1e300,
    "",
    " ",
    "x",
    "a:b",
    "../..",
    "\x00",
    "\ud800",
    "ü\U0001f600",
    "x" * 2_000,
    "1970-01-01T00:00:00Z",
    "2999-01-01T00:00:00+00:00",
    "not a date",
    "os.system",
    [],
    [None],
    [[]],
    {},
    {"": None},
    {"__type__": "uuid", "__value__": "x"},
    ["promptmill.run_jobs"],
    [{"task": "promptmill.run_jobs", "args": [], "kwargs": {}, "options": {}}],
    _DEEP,
)
_SCALARS = ("", "word", "ü", "\ud800", 0, -7, 2**70, 1e300, 0.25, True, False, None)


class Fuzz:
    """Makes items, the same ones for the same seed but for the ids in them.

    Args:
        seed: Decides them.
        model: Served name, for the messages that are whole before they are broken.
    """

    def __init__(self, *, seed: int, model: str) -> None:
        self._random = random.Random(seed)  # noqa: S311  no secret
        self._model = model
        self._kinds: tuple[Callable[[], bytes], ...] = (
            self._noise,
            self._json_of_any_shape,
            self._damaged_bytes,
            self._changed_message,
            self._changed_message,
            self._changed_headers,
            self._changed_body,
            self._changed_jobs,
            self._changed_jobs,
        )

    def item(self) -> bytes:
        """Return the next item."""
        return self._random.choice(self._kinds)()

    def _noise(self) -> bytes:
        return self._random.randbytes(self._random.randint(1, 400))

    def _json_of_any_shape(self) -> bytes:
        return _dumps(self._value(depth=4))

    def _value(self, depth: int) -> Any:
        kind = self._random.randrange(4) if depth else 0
        if kind == 1:
            return [self._value(depth - 1) for _ in range(self._random.randrange(4))]
        if kind >= 2:
            keys = ("body", "headers", "properties", "task", "id", "promptmill", "v", "jobs", "x")
            chosen = self._random.sample(keys, self._random.randrange(5))
            return {key: self._value(depth - 1) for key in chosen}
        return self._random.choice(_SCALARS)

    def _damaged_bytes(self) -> bytes:
        item = bytearray(_dumps(self._message()))
        for _ in range(self._random.randint(1, 4)):
            at = self._random.randrange(len(item) or 1)
            match self._random.randrange(4):
                case 0:
                    item[at : at + 1] = self._random.randbytes(1)
                case 1:
                    del item[at : at + self._random.randint(1, 30)]
                case 2:
                    item[at:at] = self._random.randbytes(self._random.randint(1, 8))
                case _:
                    del item[max(at, 1) :]
        return bytes(item)

    def _changed_message(self) -> bytes:
        message = self._message()
        self._change(message)
        return _dumps(message)

    def _changed_headers(self) -> bytes:
        message = self._message()
        self._change(message["headers"])
        return _dumps(message)

    def _changed_body(self) -> bytes:
        message = self._message()
        body = json.loads(message["body"])
        self._change(body)
        message["body"] = json.dumps(body)
        return _dumps(message)

    def _changed_jobs(self) -> bytes:
        message = self._message()
        self._change(message["headers"][names.JOBS_HEADER])
        return _dumps(message)

    def _change(self, whole: Any) -> None:
        """Change one to three parts, wherever they are."""
        for _ in range(self._random.randint(1, 3)):
            places = list(_places(whole))
            if not places:
                return
            part, key = self._random.choice(places)
            if self._random.random() < 0.25:
                del part[key]
            else:
                part[key] = copy.deepcopy(self._random.choice(_ODD))

    def _message(self) -> dict[str, Any]:
        jobs = tuple(
            JobSpec(
                namespace="fuzz",
                channel="fuzz",
                request=PromptRequest(prompt=f"fuzzed {self._random.random()}"),
            )
            for _ in range(self._random.randint(1, 3))
        )
        message = wire.JobMessage(namespace="fuzz", sent_at=1.0, jobs=jobs)
        if self._random.random() < 0.2:
            message = wire.JobMessage(namespace="fuzz", sent_at=1.0, ids=(uuid4(), uuid4()))
        route = wire.Route(namespace="fuzz", model=self._model, priority=names.DEFAULT_PRIORITY)
        return dict(json.loads(wire.encode(message, route)))


def _places(part: Any) -> Any:
    """Yield each container below a value, with each key or index of it."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield part, key
            yield from _places(value)
    elif isinstance(part, list):
        for at, value in enumerate(part):
            yield part, at
            yield from _places(value)


def _dumps(value: Any) -> bytes:
    # As any producer may: NaN and half characters included.
    return json.dumps(value).encode()
