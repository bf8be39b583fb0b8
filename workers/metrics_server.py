"""`MetricsServer`: serves a worker's metrics over HTTP, from a thread of its own.

``/metrics`` is what Prometheus scrapes; ``/targets`` lists every living worker of the deployment in
the form of Prometheus' HTTP service discovery, so that one address leads to all of them.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import orjson
import structlog
from prometheus_client import make_wsgi_app

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_log = structlog.get_logger(__name__)
#: Ports tried, from the first on, so that the workers of a host find one each.
PORTS = 100
_REFRESH_S = 3.0
_ANYWHERE = frozenset({"", "0.0.0.0", "::"})  # noqa: S104  compared with, not bound

#: Returns the addresses of all living workers, ``host:port``, and labels for each.
Targets = Callable[[], Awaitable[list[tuple[str, dict[str, str]]]]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_args: Any) -> None:
        """Say nothing: a scrape every few seconds is no news."""


class MetricsServer:
    """Serves metrics; starts on the loop that the worker's state belongs to.

    Args:
        registry: What is exported.
        refresh: Brings what is exported up to date; awaited on the loop before each scrape.
        targets: Lists all workers.
        host: Address to listen on.
        port: First port to try; the next free one of `PORTS` is taken.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        refresh: Callable[[], Awaitable[None]],
        targets: Targets,
        host: str,
        port: int,
    ) -> None:
        self._refresh = refresh
        self._targets = targets
        self._metrics = make_wsgi_app(registry)
        self._host = host
        self._first = port
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> str | None:
        """Where it can be scraped, ``host:port``; None when it does not serve."""
        if self._server is None:
            return None
        host = socket.gethostname() if self._host in _ANYWHERE else self._host
        return (
            f"[{host}]:{self._server.server_port}"
            if ":" in host
            else (f"{host}:{self._server.server_port}")
        )

    def start(self) -> None:
        """Begin to serve; a worker that finds no port goes on without."""
        self._loop = asyncio.get_running_loop()
        self._server = self._bound()
        if self._server is None:
            return
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="promptmill-metrics", daemon=True
        )
        self._thread.start()

    async def aclose(self) -> None:
        """Stop serving; idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()

    def _bound(self) -> WSGIServer | None:
        kind = _Server6 if ":" in self._host else _Server
        last = min(self._first + PORTS, 65536)
        for port in range(self._first, last):
            try:
                return make_server(self._host, port, self._answer, kind, _Quiet)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    _log.warning("metrics are not served", host=self._host, reason=str(exc))
                    return None
        _log.warning("metrics are not served: no port is free", first=self._first, last=last - 1)
        return None

    def _answer(self, environ: dict[str, Any], respond: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            self._on_loop(self._refresh())
            # Not OpenMetrics, which Prometheus likes better: in it prometheus_client writes vLLM's
            # names with an underscore for the colon, and no query would find them.
            asked = {**environ, "HTTP_ACCEPT": "text/plain"}
            answer: Iterable[bytes] = self._metrics(asked, respond)
            return answer
        if path == "/targets":
            found = self._on_loop(self._targets())
            if found is None:
                respond("503 Service Unavailable", [("Content-Type", "text/plain")])
                return [b"Redis cannot be asked which workers live\n"]
            respond("200 OK", [("Content-Type", "application/json")])
            return [orjson.dumps([{"targets": [at], "labels": labels} for at, labels in found])]
        respond("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /metrics and /targets\n"]

    def _on_loop(self, work: Any) -> Any:
        """Await something on the worker's loop; None when it fails or the loop does not answer."""
        if self._loop is None or self._loop.is_closed():
            work.close()
            return None
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(_REFRESH_S)
        except Exception as exc:  # noqa: BLE001  what is known is served, with its age
            future.cancel()
            _log.warning("metrics are not fresh", reason=str(exc) or type(exc).__name__)
            return None
