"""What people say of decisions on reuse, and what is told of it; who hears what is forgotten."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import orjson
import pytest
import redis as sync_redis

from schema import names
from schema.errors import InvalidRequestError
from tests.integration.builders import answer
from workers.cli import main
from workers.engine.protocols import Decision, StoredAnswer
from workers.store.answers import PostgresAnswers
from workers.store.database import Database
from workers.store.reuse_labels import wilson

if TYPE_CHECKING:
    from workers.local import LocalStack


def decision(answer_id: UUID, **fields: Any) -> Decision:
    values: dict[str, Any] = {"namespace": "default", "served": True, "similarity": 0.9}
    return Decision(request_id="r", answer_id=answer_id, **{**values, **fields})


def test_the_interval_is_wilsons() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(3, 3)[1] == 1.0


async def test_only_labels_of_what_was_served_make_the_rate(answer_store: PostgresAnswers) -> None:
    good, bad, other = uuid4(), uuid4(), uuid4()
    await answer_store.record(
        [
            *(decision(good) for _ in range(3)),
            decision(bad),
            decision(bad, served=False, rule="numbers"),
            decision(bad, served=False, rule="numbers"),
            decision(bad, served=False, rule="negation"),
            decision(good, shadow=True, agreement=0.5),
            decision(good, shadow=True, agreement=1.0),
            decision(other, namespace="other"),
        ]
    )
    report = await answer_store.reuse_report("default")
    assert (report.served, report.refused, report.shadow_would_serve) == (4, 3, 2)
    assert report.refused_by_rule == {"numbers": 2, "negation": 1}
    assert (report.agreement, report.compared) == (0.75, 2)
    assert report.wrong_rate is None
    assert report.wrong_rate_low is None

    assert await answer_store.label("default", good, "right") == 5  # those in shadow mode too
    assert await answer_store.label("default", bad, "right") == 1
    assert await answer_store.label("default", other, "wrong") == 0  # another tenant's
    [last] = [one for one in await answer_store.decisions("default") if one.label is None][:1]
    assert await answer_store.label("default", last.id, "wrong") == 1  # a refused one
    report = await answer_store.reuse_report("default")
    assert (report.labelled_right, report.labelled_wrong, report.wrong_rate) == (4, 0, 0.0)

    assert await answer_store.label("default", bad, "wrong") == 1  # the last word counts
    report = await answer_store.reuse_report("default")
    assert (report.labelled_right, report.labelled_wrong, report.wrong_rate) == (3, 1, 0.25)
    assert (report.wrong_rate_low, report.wrong_rate_high) == wilson(1, 4)
    with pytest.raises(InvalidRequestError, match="right, wrong"):
        await answer_store.label("default", bad, "good")  # type: ignore[arg-type]


async def test_a_reported_answer_was_wrongly_reused(answer_store: PostgresAnswers) -> None:
    given = answer()
    await answer_store.put(given)
    await answer_store.record([decision(given.id), decision(given.id, served=False, rule="x")])
    await answer_store.report_bad("default", given.id, "it is false")
    report = await answer_store.reuse_report("default")
    assert (report.labelled_wrong, report.labelled_right) == (1, 0)


class Told:
    """Runs the command and hears what is announced."""

    def __init__(self, urls: tuple[str, str], capfd: pytest.CaptureFixture[str]) -> None:
        self._database_url, redis_url = urls
        self._capfd = capfd
        # Kept: a client that is collected closes the connections of its subscriptions.
        self._redis: Any = sync_redis.Redis.from_url(redis_url)
        self._pubsub = self._redis.pubsub()
        self._pubsub.subscribe(names.INVALIDATIONS)
        assert self._pubsub.get_message(timeout=5) is not None
        self.namespace = f"n{uuid4().hex}"

    def __call__(self, *words: str, code: int = 0) -> str:
        assert main([*words, "--namespace", self.namespace]) == code
        return self._capfd.readouterr().out

    def store(self, given: StoredAnswer, *decided: Decision) -> None:
        async def put() -> None:
            database = Database(self._database_url)
            await PostgresAnswers(database).put(given)
            await PostgresAnswers(database).record(decided)
            await database.aclose()

        asyncio.run(put())

    def announced(self) -> dict[str, Any]:
        """The next announcement of this namespace; others use the same server."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=0.2)
            if message and (said := orjson.loads(message["data"]))["namespace"] == self.namespace:
                return dict(said)
        raise AssertionError("nothing was announced")

    def close(self) -> None:
        self._pubsub.close()
        self._redis.close()


@pytest.fixture
def told(
    stack: LocalStack,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Told]:
    """The subject."""
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", database_url)
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", stack.redis_url)
    told = Told((database_url, stack.redis_url), capfd)
    yield told
    told.close()


@pytest.mark.parametrize("by", ["tag", "model", "answer", "all", "report-bad"])
def test_everybody_hears_what_is_to_be_forgotten(told: Told, by: str) -> None:
    given = answer(namespace=told.namespace, tags=("t",))
    told.store(given)
    words = {
        "tag": ("invalidate", "--tag", "t"),
        "model": ("invalidate", "--model", "m"),
        "answer": ("invalidate", "--answer", str(given.id)),
        "all": ("invalidate", "--all"),
        "report-bad": ("report-bad", str(given.id)),
    }[by]
    told("cache", *words)
    said = told.announced()
    assert said["v"] == names.WIRE_VERSION
    # As a worker reads it.
    assert [UUID(one) for one in said.get("ids") or ()] == (
        [given.id] if by in {"answer", "report-bad"} else []
    )
    assert said.get("tag") == ("t" if by == "tag" else None)
    assert said.get("model") == ("m" if by == "model" else None)
    assert json.loads(told("cache", "stats", "--json"))["live"] == 0


def test_labels_on_the_command_line(told: Told) -> None:
    given = answer(namespace=told.namespace)
    told.store(given, decision(given.id, namespace=told.namespace))
    assert "no decision has been labelled" in told("cache", "stats")
    [one] = json.loads(told("cache", "decisions", "--served", "--json"))
    assert one["answer_id"] == str(given.id)
    told("cache", "label", one["id"], "right")
    assert "right" in told("cache", "decisions")
    assert json.loads(told("cache", "label", str(given.id), "wrong", "--json")) == {"labelled": 1}
    shown = told("cache", "stats")
    assert "100.0% (1 of 1 labelled; 95 % interval 20.7% to 100.0%)" in shown
    assert json.loads(told("cache", "stats", "--json"))["reuse"]["labelled_wrong"] == 1
    told("cache", "label", str(uuid4()), "wrong", code=2)
    told("cache", "label", one["id"], "maybe", code=2)
