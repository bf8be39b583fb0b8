"""A Redis transport for kombu that no queue item can stop.

Where kombu's own transport ends the worker on an item that is not a message, this one
moves the item, byte for byte, to a *dead list* and goes on. There also goes every message
that is rejected without being requeued: one with an unknown task or an invalid date,
which Celery rejects, and one that a task rejects (`raise Reject(requeue=False)`), as a
dead-letter exchange of AMQP would have it.

The dead list is a Redis list, oldest first, of JSON objects:

    {"v": 1, "reason": "not JSON: …", "queue": "…", "at": "2026-01-31T12:00:00+00:00",
     "bytes": 17, "item_base64": "…"}

A message is put there before it is taken off the books, so a crash between the two leaves
it twice, never not at all.

Redis' BRPOP hands an item out once, and kombu notes a moment later that it is in hand. When
Redis does not take that note, for it is full or gone, the item goes back to its list as soon
as Redis can be written to. (One whose process dies in that moment, or whose connection breaks
while it is on its way, is lost, to kombu as to us. Whoever cannot have that keeps what was
submitted in a database too.)

Use `broker_settings`. Options, in `broker_transport_options`: `dead_list` (the key),
`max_message_bytes` (beyond it an item is not parsed), `task_names` (those accepted).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
from collections import deque
from datetime import UTC, datetime
from queue import Empty
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import redis
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from kombu.transport.virtual import Message as VirtualMessage
from kombu.utils.json import dumps, loads

from schema.errors import MessageFormatError
from schema.names import DEAD_LETTERS

from .envelope import DEFAULT_MAX_BYTES, check_item, check_message, is_task_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

__all__ = ["Channel", "Transport", "broker_settings", "limit_intake", "read_dead"]

logger = logging.getLogger(__name__)

#: How Redis says that it takes no writes now: its disk or memory is full, or it follows another.
_PASSES_BY = ("MISCONF ", "NOREPLICAS ", "UNBLOCKED ")
# redis-py has classes of their own for these, and drops the word.
_PASS_BY = (redis.OutOfMemoryError, redis.ReadOnlyError)

MOST_KEPT_BYTES = 256 * 1024 * 1024

PATH = "workers.transport:Transport"
# By this name a broker URL can ask for it, the only way to reach it over a Unix socket.
TRANSPORT_ALIASES["promptmill"] = PATH


def broker_settings(
    redis_url: str,
    *,
    dead_list: str = DEAD_LETTERS,
    max_message_bytes: int = DEFAULT_MAX_BYTES,
    task_names: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the Celery settings that select this transport.

    Args:
        redis_url: as redis-py has it: `redis://`, `rediss://` or `unix://path?db=0`.
        dead_list: key of the Redis list for what is no message.
        max_message_bytes: the size beyond which an item is not parsed, in bytes.
        task_names: the tasks that may be asked for. Celery refuses unknown ones itself, but
            writes all headers of such a message to its log. None leaves it to Celery.

    Returns:
        `broker_url`, `broker_transport`, `broker_transport_options`, and user and password, which
        are never in the URL: Celery shows that of a socket, as it is, to whoever inspects a worker.
    """
    parts = urlsplit(redis_url)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    # redis-py takes them from either place.
    user, password = query.pop("username", None), query.pop("password", None)
    scheme = parts.scheme
    if scheme in ("unix", "redis+socket"):
        scheme = "promptmill+socket"
        query["virtual_host"] = query.pop("db", query.get("virtual_host", "0"))
    place = parts.netloc.rpartition("@")[2]
    return {
        "broker_url": f"{scheme}://{place}{parts.path}{'?' if query else ''}{urlencode(query)}",
        "broker_user": unquote(parts.username) if parts.username else user,
        "broker_password": unquote(parts.password) if parts.password else password,
        "broker_transport": PATH,
        "broker_transport_options": {
            "dead_list": dead_list,
            "max_message_bytes": max_message_bytes,
            "task_names": None if task_names is None else sorted(task_names),
        },
    }


def limit_intake(wants_more: Callable[[], bool] | None) -> None:
    """Leave tasks in the queue while this process has no use for them.

    What is in the queue can still be passed by something more urgent, or be taken by another
    worker. Wake the hub when the answer becomes true.

    Args:
        wants_more: asked in the hub's thread before a task is fetched; None fetches always.
    """
    Channel.wants_more = staticmethod(wants_more or _always)


def read_dead(entry: bytes | str) -> tuple[bytes, str, str]:
    """Take an entry of the dead list apart.

    Returns:
        The item's bytes, why it is there, and the queue it came from.
    """
    record = json.loads(entry)
    return base64.b64decode(record["item_base64"]), record["reason"], record["queue"]


@contextlib.contextmanager
def _refusals_pass_by() -> Iterator[None]:
    """Have a Redis that takes no writes now be waited for.

    Celery would take its answer for a bug, and end the worker; so it connects again and again.
    """
    try:
        yield
    except redis.ResponseError as exc:
        if not isinstance(exc, _PASS_BY) and not any(word in str(exc) for word in _PASSES_BY):
            raise
        raise redis.ConnectionError(str(exc)) from exc


class _Guard:
    """A Redis client whose BRPOP yields sound items only."""

    def __init__(self, *args: Any, sift: Callable[[Any], Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sift = sift

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        """Return the reply; None, as when nothing came in time, for an unsound item."""
        with _refusals_pass_by():
            reply = super().parse_response(connection, command_name, **options)  # type: ignore[misc]
        return self._sift(reply) if command_name == "BRPOP" and reply else reply

    def pipeline(self, *args: Any, **kwargs: Any) -> Any:
        """Return a pipeline; it reads replies by itself, and must have refusals wait as well."""
        pipe = super().pipeline(*args, **kwargs)  # type: ignore[misc]
        execute = pipe.execute

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with _refusals_pass_by():
                return execute(*args, **kwargs)

        pipe.execute = guarded
        return pipe


class _GuardedRedis(_Guard, redis.Redis):  # type: ignore[type-arg,unused-ignore]  # by some stubs
    """With plain keys."""


class _GuardedPrefixedRedis(_Guard, kombu_redis.PrefixedStrictRedis):
    """With kombu's `global_keyprefix`."""


class Message(VirtualMessage):
    """A message that knows the bytes it was read from."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        super().__init__(payload, channel=channel, **kwargs)
        #: The key of the list, and the item.
        self.origin: tuple[bytes, bytes] | None = channel.take_origin() if channel else None


def _always() -> bool:
    return True


class QoS(kombu_redis.QoS):
    """Lets no message be fetched that the worker has no use for yet."""

    def can_consume(self) -> bool:
        """Say whether a message may be fetched. One that was asked for is always taken in."""
        channel = self.channel
        if not super().can_consume():
            return False
        return bool(not channel.active_queues or channel._in_poll or channel.wants_more())  # noqa: SLF001

    def append(self, message: Message, delivery_tag: str) -> None:
        """Note that a message is in hand, or see to it that it goes back."""
        try:
            super().append(message, delivery_tag)
        except (redis.RedisError, OSError):
            if message.origin is not None:
                self.channel.unnoted.append(message.origin)
            raise


class Channel(kombu_redis.Channel):
    """The channel that sifts what it reads."""

    Message = Message
    QoS = QoS

    #: Asked before a task is fetched; see `limit_intake`.
    wants_more: ClassVar[Callable[[], bool]] = staticmethod(_always)

    dead_list = DEAD_LETTERS
    max_message_bytes = DEFAULT_MAX_BYTES
    task_names: Collection[str] | None = None
    from_transport_options = (
        *kombu_redis.Channel.from_transport_options,
        "dead_list",
        "max_message_bytes",
        "task_names",
    )

    #: Entries that could not be written because Redis was away. The next channel, made
    #: when the worker has reconnected, writes them.
    unwritten: ClassVar[deque[str]] = deque()

    #: Items that are in no list and not noted as in hand either, as it failed.
    unnoted: ClassVar[deque[tuple[bytes, bytes]]] = deque()

    _origin: tuple[bytes, bytes] | None = None
    _own_client: Any = None  # for all but the waiting for messages

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._write_dead()
        self._put_back()

    def take_origin(self) -> tuple[bytes, bytes] | None:
        """Return once the key and the bytes of the item being delivered."""
        origin, self._origin = self._origin, None
        return origin

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Reject a message; unless it is requeued, it goes to the dead list first."""
        if not requeue:
            try:
                message = self.qos.get(delivery_tag)
            except KeyError:
                message = None  # rejected before
            if message is not None:
                raw = message.origin[1] if message.origin else dumps(message._raw).encode()  # noqa: SLF001
                info, task = message.delivery_info, message.headers.get("task")
                self._bury(raw, info.get("routing_key", ""), f"rejected: task {task!r:.200}")
        super().basic_reject(delivery_tag, requeue=requeue)

    # kombu's private seams: where items come in ------------------------------------------

    def _get_client(self) -> Any:
        super()._get_client()  # checks redis-py's version
        if self.global_keyprefix:
            return functools.partial(
                _GuardedPrefixedRedis, sift=self._sift, global_keyprefix=self.global_keyprefix
            )
        return functools.partial(_GuardedRedis, sift=self._sift)

    def _connparams(self, asynchronous: bool = False) -> Any:
        # Celery closes a lost connection twice. The second time kombu would look for an address
        # that is gone, and that AttributeError ends the worker.
        if getattr(self.connection, "client", None) is None:
            raise redis.ConnectionError("the connection was closed before")
        values = super()._connparams(asynchronous=asynchronous)
        client = self.connection.client
        # What kombu reads of a socket's address has them not.
        return values | {"username": client.userid, "password": client.password}

    def _create_client(self, asynchronous: bool = False) -> Any:
        # kombu makes one for every acknowledgement, and to make one takes longer than to use it.
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._own_client is None or self._own_client.connection_pool is not self.pool:
            self._own_client = super()._create_client()
        return self._own_client

    def _get(self, queue: str) -> Any:
        with self.conn_or_acquire() as client:
            for priority in self.priority_steps:
                key = self._q_for_pri(queue, priority)
                while item := client.rpop(key):
                    if self._sift((key.encode(), item)) is not None:
                        self._maybe_update_queues_expire(client, queue)
                        return loads(item.decode())
            self._maybe_update_queues_expire(client, queue)
        raise Empty

    def _deliver_fanout_message(self, message: Any, exchange: str) -> Any:
        try:
            check_message(message, is_task=False)
        except MessageFormatError as exc:
            self._bury(dumps(message).encode(), exchange, str(exc))
            return False
        return super()._deliver_fanout_message(message, exchange)

    def _sift(self, reply: tuple[bytes, bytes]) -> tuple[bytes, bytes] | None:
        key, raw = reply
        queue = key.decode(errors="replace").rsplit(self.sep, 1)[0]
        try:
            payload = check_item(raw, queue, max_bytes=self.max_message_bytes)
            if is_task_queue(queue):
                self._check_task(payload, queue)
        except MessageFormatError as exc:
            self._bury(raw, queue, str(exc))
            return None
        self._origin = reply
        return reply

    def _check_task(self, payload: dict[str, Any], queue: str) -> None:
        task = payload["headers"]["task"]
        if self.task_names is not None and task not in self.task_names:
            raise MessageFormatError(f"not a task of this worker: {task!r:.200}")
        info = payload["properties"]["delivery_info"]
        # kombu drops what it cannot put back into a queue.
        if not info["routing_key"]:
            raise MessageFormatError("not a message: properties.delivery_info.routing_key: empty")
        if not info["exchange"] and info["routing_key"] != queue:
            # Given back, it would go to a queue that nobody may read.
            raise MessageFormatError(
                "not a message: properties.delivery_info.routing_key: of another queue"
            )
        if info["exchange"] and not self._lookup(info["exchange"], info["routing_key"]):
            raise MessageFormatError(
                "not a message: properties.delivery_info: no queue is bound to that exchange"
            )

    # The dead list -------------------------------------------------------------------------

    def _bury(self, raw: bytes, queue: str, reason: str) -> None:
        logger.error("moving an item of queue %r to %r: %s", queue, self.dead_list, reason)
        entry = {
            "v": 1,
            "reason": reason,
            "queue": queue,
            "at": datetime.now(UTC).isoformat(),
            "bytes": len(raw),
            # Redis refuses values above 512 MB, and base64 makes four bytes of three.
            "item_base64": base64.b64encode(raw[:MOST_KEPT_BYTES]).decode(),
        }
        self.unwritten.append(json.dumps(entry))
        self._write_dead()

    def _write_dead(self) -> None:
        while self.unwritten:
            with self.conn_or_acquire() as client:
                client.rpush(self.dead_list, self.unwritten[0])
            self.unwritten.popleft()

    def _put_back(self) -> None:
        # As it may have been noted after all, it may come twice.
        while self.unnoted:
            key, raw = self.unnoted[0]
            with self.conn_or_acquire() as client:
                client.rpush(key.decode(), raw)
            self.unnoted.popleft()


class Transport(kombu_redis.Transport):
    """kombu's Redis transport with the sifting `Channel`."""

    Channel = Channel
