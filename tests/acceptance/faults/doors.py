"""A door between a deployment and a server, to be shut or blocked as a network may be."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

_PIECE = 65_536


class Door:
    """Forwards TCP connections of this machine to a Unix socket.

    Args:
        socket: Of the server.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._open = True
        self._flow = asyncio.Event()
        self._flow.set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        """Open it; return its port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Shut it for good."""
        self._server.close()
        self.shut()
        self.unblock()

    @property
    def whole(self) -> bool:
        """Whether it is neither shut nor blocked."""
        return self._open and self._flow.is_set()

    def shut(self) -> None:
        """Break off every connection, and refuse new ones."""
        self._open = False
        for writer in tuple(self._writers):
            writer.transport.abort()

    def open(self) -> None:
        """Let connections in again."""
        self._open = True

    def block(self) -> None:
        """Hold back every byte, as a network that swallows packets; connections stay."""
        self._flow.clear()

    def unblock(self) -> None:
        """Let what was held back pass."""
        self._flow.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if not self._open:
                return
            back, forth = await asyncio.open_unix_connection(self._socket)
            self._writers.add(forth)
            try:
                await asyncio.gather(self._pump(reader, forth), self._pump(back, writer))
            finally:
                self._writers.discard(forth)
                forth.transport.abort()
        except OSError:
            pass  # the server itself is away
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(_PIECE):
                await self._flow.wait()
                sink.write(piece)
                await sink.drain()
        sink.transport.abort()
