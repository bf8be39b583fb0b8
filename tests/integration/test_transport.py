"""Poison thrown at a real worker: it goes on, and every byte of it is kept."""

from __future__ import annotations

import base64
import importlib
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from tests.integration.pool_worker import (
    DEADLINE_S,
    Worker,
    kombu_url,
    plain_redis,
    running,
    until,
)
from workers.transport import broker_settings, read_dead

QUEUE = "hardened"
DEAD = "promptmill:dead"


@pytest.fixture(scope="module")
def server(stack: Any) -> Iterator[Any]:
    client = plain_redis(stack.redis_url)
    client.flushdb()
    yield client
    client.flushdb()
    client.close()


@pytest.fixture(scope="module")
def tasks(stack: Any, server: Any) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POOL_APP_URL", kombu_url(stack.redis_url))
        module = importlib.import_module("tests.integration.pool_app")
    yield module
    module.app.close()


@pytest.fixture(scope="module")
def worker(stack: Any, server: Any, tasks: Any, tmp_path_factory: Any) -> Iterator[Worker]:
    log = tmp_path_factory.mktemp("transport") / "worker.log"
    url = kombu_url(stack.redis_url)
    with running(url, server, log, queue=QUEUE, hardened=1, concurrency=20) as worker:
        yield worker.ready()


@pytest.fixture(scope="module")
def sound(tasks: Any, server: Any) -> dict[str, Any]:
    """A message as Celery sends it."""
    tasks.empty.apply_async(queue="sample")
    return addressed(json.loads(server.rpop("sample")), QUEUE)


def addressed(sound: dict[str, Any], queue: str) -> dict[str, Any]:
    """Return a copy of a message that belongs to another queue."""
    message: dict[str, Any] = json.loads(json.dumps(sound))
    message["properties"]["delivery_info"]["routing_key"] = queue
    return message


def encoded(body: Any) -> str:
    return base64.b64encode(body if isinstance(body, bytes) else json.dumps(body).encode()).decode()


def poison(sound: dict[str, Any]) -> dict[str, bytes]:
    """Return items that are no messages of ours, by what is wrong with them."""

    def changed(*path: str, to: Any = None) -> bytes:
        message = json.loads(json.dumps(sound))
        *parents, last = path
        part = message
        for name in parents:
            part = part[name]
        if to is None:
            del part[last]
        else:
            part[last] = to
        return json.dumps(message).encode()

    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return {
        "text": b"not json",
        "nothing but a space": b" ",
        "binary": bytes(range(256)),
        "pickle": pickle.dumps({"task": "empty"}),
        "not utf-8": b'{"body": "\xff"}',
        "half a message": json.dumps(sound).encode()[:-20],
        "array": b"[]",
        "null": b"null",
        "number": b"1e999",
        "digits without end": b"9" * 10_000,
        "nested": b"[" * 50_000,
        "nested and closed": b"[" * 40_000 + b"]" * 40_000,
        "empty object": b"{}",
        "unknown json type": b'{"__type__": "code", "__value__": "1"}',
        "no properties": changed("properties"),
        "properties of another type": changed("properties", to=[1]),
        "no delivery tag": changed("properties", "delivery_tag"),
        "delivery tag of another type": changed("properties", "delivery_tag", to={"a": 1}),
        "no delivery info": changed("properties", "delivery_info"),
        "no exchange": changed("properties", "delivery_info", "exchange"),
        "exchange of nobody": changed("properties", "delivery_info", "exchange", to="nobody"),
        "empty routing key": changed("properties", "delivery_info", "routing_key", to=""),
        "routing key of nobody": changed("properties", "delivery_info", "routing_key", to="no"),
        "priority of another type": changed("properties", "priority", to="high"),
        "no body": changed("body"),
        "body of another type": changed("body", to={"a": 1}),
        "body not base64": changed("body", to="abc"),
        "body not ascii": changed("body", to="ü"),
        "body not json": changed("body", to=encoded(b"not json")),
        "body not utf-8": changed("body", to=encoded(b'["\xff"]')),
        "body an object": changed("body", to=encoded({"args": []})),
        "body too short": changed("body", to=encoded([[], {}])),
        "args of another type": changed("body", to=encoded(["ab", {}, embed])),
        "kwargs of another type": changed("body", to=encoded([[], [], embed])),
        "no task to follow": changed("body", to=encoded([[], {}, {**embed, "chain": [{}]}])),
        "a callback that is none": changed(
            "body", to=encoded([[], {}, {**embed, "callbacks": [5]}])
        ),
        "foreign embed": changed("body", to=encoded([[], {}, {"id": "other"}])),
        "too large": changed("headers", "more", to="x" * 100_000),
        "pickled body": changed("content-type", to="application/x-python-serialize"),
        "yaml body": changed("content-type", to="application/x-yaml"),
        "no content type": changed("content-type"),
        "foreign encoding": changed("content-encoding", to="utf-7"),
        "compressed": changed("headers", "compression", to="application/x-gzip"),
        "bomb": changed("body", to=encoded(zlib.compress(b"0" * 10_000_000))),
        "no headers": changed("headers"),
        "headers of another type": changed("headers", to="x"),
        "foreign headers": changed("headers", to={"dramatiq": True}),
        "no task": changed("headers", "task"),
        "task of another type": changed("headers", "task", to=["empty"]),
        "unknown task": changed("headers", "task", to="os.system"),
        "no id": changed("headers", "id"),
        "id of another type": changed("headers", "id", to=5),
        "id with a NUL": changed("headers", "id", to="a\x00b"),
        "id of half a character": changed("headers", "id", to="\ud800"),
        "eta of another type": changed("headers", "eta", to=5),
        "eta no date": changed("headers", "eta", to="tomorrow"),
        "eta far away": changed("headers", "eta", to="2999-01-01T00:00:00+00:00"),
        "expires no date": changed("headers", "expires", to="never"),
        "expired": changed("headers", "expires", to="1970-01-01T00:00:00+00:00"),
        "time limit of another type": changed("headers", "timelimit", to="long"),
        "time limit": changed("headers", "timelimit", to=[0.001, None]),
        "negative time limit": changed("headers", "timelimit", to=[-1, None]),
        "retries of another type": changed("headers", "retries", to="many"),
        "stamps of another type": changed("headers", "stamped_headers", to=[["a"]]),
        "shadow of another type": changed("headers", "shadow", to=["a"]),
    }


def test_poison_is_set_aside_and_the_worker_goes_on(
    worker: Worker, tasks: Any, server: Any, sound: dict[str, Any]
) -> None:
    server.delete(DEAD)
    items = poison(sound)
    for item in items.values():
        server.lpush(QUEUE, item)
    good = tasks.plain_nap.apply_async((0.01,), queue=QUEUE)
    assert good.get(timeout=DEADLINE_S) == "asyncio-pool"
    until("all to be set aside", lambda: server.llen(DEAD) >= len(items))

    entries = [read_dead(entry) for entry in server.lrange(DEAD, 0, -1)]
    assert sorted(item for item, _, _ in entries) == sorted(items.values())
    assert {queue for _, _, queue in entries} == {QUEUE}
    assert all(reason for _, reason, _ in entries)
    until("nothing to be unacknowledged", lambda: server.hlen("unacked") == 0)
    assert server.llen(QUEUE) == 0
    assert not worker.gone()
    assert "Connection to broker lost" not in worker.output()


def test_a_task_can_refuse_its_message(worker: Worker, tasks: Any, server: Any) -> None:
    server.delete(DEAD)
    tasks.refuses.apply_async(queue=QUEUE)
    until("it to be set aside", lambda: server.llen(DEAD) == 1)
    item, reason, _ = read_dead(server.lindex(DEAD, 0))
    assert json.loads(item)["headers"]["task"] in reason
    until("nothing to be unacknowledged", lambda: server.hlen("unacked") == 0)


@pytest.mark.parametrize("data", [b"not json", b"{}", b"\xff", b'{"properties": {}}', b"[1]"])
def test_poison_on_the_control_channel(
    worker: Worker, tasks: Any, server: Any, data: bytes
) -> None:
    for channel in server.pubsub_channels("*celery.pidbox*"):
        server.publish(channel, data)
    pong = tasks.app.control.inspect(["w@test"], timeout=5).ping()
    assert pong == {"w@test": {"ok": "pong"}}


def test_values_of_sound_messages_do_not_matter(worker: Worker, tasks: Any, server: Any) -> None:
    server.delete(DEAD)
    name = "ü \x00 " + "x" * 1000
    assert tasks.plain_nap.apply_async((0.0, name), queue=QUEUE).get(timeout=DEADLINE_S)
    assert server.llen(DEAD) == 0


def test_basic_get_skips_poison(stack: Any, server: Any, sound: dict[str, Any]) -> None:
    server.delete(DEAD, "got")
    settings = broker_settings(kombu_url(stack.redis_url))
    message = addressed(sound, "got")
    for item in (b"poison", json.dumps(message).encode()):
        server.lpush("got", item)
    with Connection(
        settings["broker_url"],
        transport=settings["broker_transport"],
        transport_options=settings["broker_transport_options"],
    ) as connection:
        channel = connection.channel()
        found = channel.basic_get("got")
        assert found.headers["id"] == message["headers"]["id"]
        found.ack()
        assert channel.basic_get("got") is None
    assert read_dead(server.lindex(DEAD, 0))[0] == b"poison"


def test_a_redis_that_takes_no_writes_is_waited_for(
    stack: Any, server: Any, sound: dict[str, Any]
) -> None:
    """Celery takes a refusal for a bug of its own and ends the worker, a lost connection not."""
    settings = broker_settings(kombu_url(stack.redis_url))
    message = addressed(sound, "got")
    server.lpush("got", json.dumps(message).encode())
    with Connection(settings["broker_url"], transport=settings["broker_transport"]) as connection:
        channel = connection.channel()
        found = channel.basic_get("got")
        server.config_set("min-replicas-to-write", 1)
        try:
            # To note that a message is in hand, and that it is done.
            with pytest.raises(connection.connection_errors, match="NOREPLICAS"):
                channel.qos.append(found, "another")
            assert channel.unnoted.pop() == found.origin  # the next channel would put it back
            with pytest.raises(connection.connection_errors, match="NOREPLICAS"):
                found.ack()
        finally:
            server.config_set("min-replicas-to-write", 0)
        found.ack()
        until("nothing to be unacknowledged", lambda: server.hlen("unacked") == 0)


def test_a_message_that_redis_did_not_note_goes_back(
    stack: Any, server: Any, sound: dict[str, Any]
) -> None:
    """A full Redis lets items be taken, and takes no note of it."""
    settings = broker_settings(kombu_url(stack.redis_url))
    message = addressed(sound, "got")
    item = json.dumps(message).encode()

    def connect() -> Connection:
        return Connection(settings["broker_url"], transport=settings["broker_transport"])

    server.delete("got")
    server.lpush("got", item)
    with connect() as connection:
        channel = connection.channel()
        server.config_set("maxmemory", 1)
        try:
            with pytest.raises(connection.connection_errors, match="maxmemory"):
                channel.basic_get("got")
            assert server.llen("got") == 0
            with connect() as again, pytest.raises(connection.connection_errors, match="maxmemory"):
                again.channel()  # the worker waits until it can put the item back
        finally:
            server.config_set("maxmemory", 0)
        with connect() as again:
            found = again.channel().basic_get("got")
            assert found.origin == (b"got", item)
            found.ack()
            assert again.channel().basic_get("got") is None
    assert server.hlen("unacked") == 0


def test_entries_survive_an_outage(stack: Any, server: Any, monkeypatch: Any) -> None:
    server.delete(DEAD)
    settings = broker_settings(kombu_url(stack.redis_url))

    def connect() -> Connection:
        return Connection(settings["broker_url"], transport=settings["broker_transport"])

    with connect() as connection:
        channel = connection.channel()
        with monkeypatch.context() as away:
            away.setattr(channel.Client.func, "rpush", _away)
            with pytest.raises(ConnectionError):
                channel._bury(b"kept", "q", "why")
        assert server.llen(DEAD) == 0
        with connect() as again:
            again.channel()
    assert read_dead(server.lindex(DEAD, 0)) == (b"kept", "why", "q")


def _away(*args: Any) -> None:
    raise ConnectionError("away")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:s@h:1/2", ("redis://h:1/2", None, "s")),
        ("redis://h:1/2?username=u&password=p%2F", ("redis://h:1/2", "u", "p/")),
        ("rediss://h/0?ssl_cert_reqs=none", ("rediss://h/0?ssl_cert_reqs=none", None, None)),
        ("unix:///run/v.sock?db=3", ("promptmill+socket:///run/v.sock?virtual_host=3", None, None)),
        ("unix:///run/v.sock", ("promptmill+socket:///run/v.sock?virtual_host=0", None, None)),
        (
            "unix://u:p%40@/run/v.sock",
            ("promptmill+socket:///run/v.sock?virtual_host=0", "u", "p@"),
        ),
    ],
)
def test_broker_url(url: str, expected: tuple[str, str | None, str | None]) -> None:
    found = broker_settings(url)
    assert tuple(found[f"broker_{name}"] for name in ("url", "user", "password")) == expected


def test_the_dead_list_is_documented_as_it_is(tmp_path: Path) -> None:
    entry = json.dumps({"item_base64": "AAE=", "reason": "r", "queue": "q"})
    assert read_dead(entry) == (b"\x00\x01", "r", "q")


def test_a_closed_connection_is_a_connection_error(
    stack: Any, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery closes a lost connection twice; any other error then ends the worker."""
    settings = broker_settings(kombu_url(stack.redis_url))
    with (
        Connection(settings["broker_url"], transport=settings["broker_transport"]) as connection,
        monkeypatch.context() as closed,
    ):
        channel = connection.default_channel
        closed.setattr(channel.connection, "client", None)
        with pytest.raises(connection.connection_errors):
            channel._connparams()


def test_a_worker_outlives_a_redis_that_follows_another(
    worker: Worker, tasks: Any, server: Any
) -> None:
    """As after a failover, until the address leads to the one that took over."""
    server.execute_command("REPLICAOF", "127.0.0.1", 1)
    try:
        until("it to notice", lambda: "Connection to broker lost" in worker.output())
    finally:
        server.execute_command("REPLICAOF", "NO", "ONE")
    done = tasks.plain_nap.apply_async((0.01,), queue=QUEUE)
    assert done.get(timeout=DEADLINE_S) == "asyncio-pool"
    assert not worker.gone()
