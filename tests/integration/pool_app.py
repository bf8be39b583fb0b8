"""A tiny Celery application whose workers the integration tests start.

Its tasks leave traces in Redis, so that a test can see what happened in the worker:
each event is one item of the list named by `EVENTS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator

import redis
from celery import Celery
from celery.exceptions import Reject, SoftTimeLimitExceeded

from workers.pool import AsyncTask, TaskPool, lifespan, running_pool, wait_for
from workers.transport import broker_settings

EVENTS = "events"
URL = os.environ.get("POOL_APP_URL", "redis://127.0.0.1:1/0")

app = Celery("pool_app", broker=URL, backend=URL)
app.conf.update(
    worker_pool=os.environ.get("POOL_APP_POOL", "workers.pool:TaskPool"),
    worker_concurrency=int(os.environ.get("POOL_APP_CONCURRENCY", "500")),
    worker_prefetch_multiplier=int(os.environ.get("POOL_APP_PREFETCH", "1")),
    worker_disable_prefetch=bool(os.environ.get("POOL_APP_DISABLE_PREFETCH")),
    worker_soft_shutdown_timeout=float(os.environ.get("POOL_APP_SOFT_SHUTDOWN", "0")),
    worker_cancel_long_running_tasks_on_connection_loss=True,
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
    accept_content=["json"],
    worker_hijack_root_logger=False,
    task_default_queue=os.environ.get("POOL_APP_QUEUE", "pool"),
    worker_pool_exit_timeout_s=float(os.environ.get("POOL_APP_EXIT", "30")),
)
app.conf.worker_pool_cancel_timeout_s = float(os.environ.get("POOL_APP_CANCEL", "5"))
if os.environ.get("POOL_APP_DRAIN"):
    app.conf.worker_pool_drain_timeout_s = float(os.environ["POOL_APP_DRAIN"])
if os.environ.get("POOL_APP_HARDENED"):
    app.conf.update(broker_settings(URL, max_message_bytes=100_000))

_trace = redis.Redis.from_url(URL.replace("redis+socket", "unix").replace("virtual_host=", "db="))


def note(event: str) -> None:
    """Leave a trace that the test can read."""
    _trace.rpush(EVENTS, event)


@lifespan(app)
@contextlib.asynccontextmanager
async def life(pool: TaskPool) -> AsyncIterator[None]:
    if os.environ.get("POOL_APP_FAIL_START"):
        raise RuntimeError("the engine does not start")
    if os.environ.get("POOL_APP_SLOW_START"):
        note("entering")
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            note("start cancelled")
            raise
    note(f"enter {pool.loop is asyncio.get_running_loop()}")
    yield
    await asyncio.sleep(0)
    note("leave")


@app.task(base=AsyncTask)
async def nap(seconds: float, name: str = "") -> str:
    """Sleep on the loop, and say how it ended."""
    if name:
        note(f"start {name}")
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        note(f"cancelled {name}")
        raise
    except SoftTimeLimitExceeded:
        note(f"soft {name}")
        raise
    finally:
        if name:
            note(f"finally {name}")
    return f"{threading.current_thread().name} {threading.active_count()}"


@app.task
def plain_nap(seconds: float, name: str = "") -> str:
    """Sleep from ordinary code."""
    try:
        wait_for(asyncio.sleep(seconds))
    except SoftTimeLimitExceeded:
        note(f"soft {name}")
        return "caught"
    return threading.current_thread().name


@app.task(base=AsyncTask)
async def stubborn(seconds: float) -> None:
    """Swallow the first two cancellations."""
    for _ in range(2):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            note("swallowed")
    await asyncio.sleep(seconds)


@app.task
def empty() -> None:
    """Do nothing."""


@app.task
def fails() -> None:
    raise ValueError("no luck")


@app.task(
    base=AsyncTask, bind=True, autoretry_for=(ValueError,), max_retries=1, default_retry_delay=0
)
async def fails_once(self: AsyncTask) -> int:
    await asyncio.sleep(0)
    if self.request.retries == 0:
        raise ValueError("once")
    return int(self.request.retries)


@app.task(base=AsyncTask, bind=True)
async def who(self: AsyncTask) -> str:
    await asyncio.sleep(0.05)
    return str(self.request.id)


@app.task
def raises(kind: str) -> None:
    """Raise what is no `Exception`."""
    kinds = {
        "SystemExit": SystemExit,
        "KeyboardInterrupt": KeyboardInterrupt,
        "GeneratorExit": GeneratorExit,
        "CancelledError": asyncio.CancelledError,
        "MemoryError": MemoryError,
        "GreenletExit": __import__("greenlet").GreenletExit,
        "StopIteration": StopIteration,
    }
    raise kinds[kind]


@app.task(base=AsyncTask)
async def raises_async(kind: str) -> None:
    await asyncio.sleep(0)
    raise {"SystemExit": SystemExit, "GeneratorExit": GeneratorExit}[kind]


@app.task(acks_late=False)
def early(seconds: float) -> None:
    """Wait, its message already acknowledged."""
    note("start early")
    wait_for(asyncio.sleep(seconds))


@app.task
def blocks(seconds: float) -> None:
    """Hold the loop, as no task should."""
    note("start blocks")
    time.sleep(seconds)


@app.task
def refuses() -> None:
    """Reject its own message."""
    raise Reject("not for me", requeue=False)


@app.task
def pool_seen() -> str:
    return type(running_pool().loop).__module__
