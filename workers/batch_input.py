"""Reading a batch file: plain, compressed or from standard input, in a thread, a bit ahead."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import sys
import threading
import zlib
from collections import deque
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from schema.errors import ConfigurationError, InvalidFileError
from schema.openai_batch import BadLine, BatchLine, BatchParser, read_lines
from workers import parquet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

#: Name that stands for standard input or output.
STANDARD = "-"
_AHEAD = 1024
_AHEAD_BYTES = 32 * 2**20
# With so many lines and not one JSON object, the file is of another kind.
_MOST_STRANGE = 1000
_HEAD_BYTES = 1 << 20
# Little at a time: what it expands to is in memory.
_PACKED_BYTES = 1 << 14
#: What reading a file raises that is damaged, or no archive at all.
BROKEN = (OSError, EOFError, ValueError, zlib.error)


def open_input(path: str) -> BinaryIO:
    """Open a batch file for reading; ``.gz`` and ``.zst`` are decompressed, Parquet is not.

    Args:
        path: The file, or ``-``.

    Raises:
        InvalidFileError: It is missing, a folder, empty or not readable.
        ConfigurationError: It is a ``.zst``, and `zstandard` is not installed.
    """
    if path == STANDARD:
        return sys.stdin.buffer
    file = Path(path)
    try:
        if file.is_dir():
            msg = "is a folder; name a file of one request a line"
            raise InvalidFileError(msg, path=path)
        if file.is_file() and file.stat().st_size == 0:
            msg = "is empty; it must hold one request a line"
            raise InvalidFileError(msg, path=path)
        if path.endswith(".gz"):
            return gzip.open(path, "rb")  # type: ignore[return-value]  # a BinaryIO in all but name
        if path.endswith(".zst"):
            return _zstandard(path)
        return file.open("rb")
    except OSError as exc:
        msg = f"cannot be read: {exc.strerror or exc}"
        raise InvalidFileError(msg, path=path) from exc


def lines_of(path: str, file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield what stands in the lines of a batch file, or in the rows of a Parquet file.

    Args:
        path: The file.
        file: The same, opened by `open_input`.

    Yields:
        Number, counted from 1, and JSON; None for a line that is too long.
    """
    return parquet.lines(path) if path.endswith(parquet.ENDING) else read_lines(file)


def check_input(path: str) -> None:
    """Refuse a file that is no batch, before anything is started for it.

    Args:
        path: The file; standard input and pipes can be read once only, and are left alone.

    Raises:
        InvalidFileError: It is missing, a folder, empty, not readable, or holds no JSON object.
    """
    file_like = Path(path)
    if path == STANDARD or (file_like.exists() and not file_like.is_file() | file_like.is_dir()):
        return
    strange: list[BadLine] = []
    parser = BatchParser()
    with open_input(path) as file:
        try:
            for number, raw in lines_of(path, file):
                line = parser.parse(number, raw)
                if isinstance(line, BatchLine) or line.is_object:
                    return
                strange.append(line)
                if len(strange) >= _MOST_STRANGE:
                    break
        except BROKEN as exc:
            raise InvalidFileError(f"broke off: {exc}", path=path) from exc
    raise _not_jsonl(path, strange)


def _not_jsonl(path: str, strange: list[BadLine]) -> InvalidFileError:
    if not strange:
        return InvalidFileError("is empty; it must hold one request a line", path=path)
    reason = strange[0].message.removeprefix(f"line {strange[0].number}: ")
    msg = f"is not a file of one JSON object a line: {reason}"
    return InvalidFileError(msg, path=path, line=strange[0].number)


def _zstandard(path: str) -> BinaryIO:
    try:
        zstandard = import_module("zstandard")
    except ImportError:
        msg = "reading .zst needs the package zstandard: pip install zstandard"
        raise ConfigurationError(msg) from None
    return io.BufferedReader(_Zstandard(Path(path).open("rb"), zstandard), 1 << 20)


class _Zstandard(io.RawIOBase):
    """Decompresses; unlike the package's own reader, it tells a file that was cut short."""

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        """Say so."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with plain bytes; 0 at the end."""
        while not self._ready:
            packed = self._file.read(_PACKED_BYTES)
            if not packed:
                if self._frame is not None:
                    msg = "the compressed file was cut short"
                    raise EOFError(msg)
                return 0
            try:
                self._decompress(packed)
            except self._error as exc:
                raise OSError(str(exc)) from exc
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _decompress(self, packed: bytes) -> None:
        plain = []
        while packed:
            self._frame = self._frame or self._decompressor.decompressobj()
            plain.append(self._frame.decompress(packed))
            packed = b""
            if self._frame.eof:
                packed, self._frame = self._frame.unused_data, None
        self._ready = b"".join(plain)


def identity(path: str) -> dict[str, object] | None:
    """Return what tells one input file from another without reading all of it.

    Args:
        path: The file, or ``-``.

    Returns:
        Size and a digest of the beginning and the end; None for what can be read once only.

    Raises:
        InvalidFileError: It cannot be read.
    """
    if path == STANDARD or not Path(path).is_file():
        return None
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.sha256(file.read(_HEAD_BYTES))
            size = file.seek(0, 2)
            file.seek(max(0, size - _HEAD_BYTES))
            digest.update(file.read())
    except OSError as exc:
        msg = f"cannot be read: {exc.strerror or exc}"
        raise InvalidFileError(msg, path=path) from exc
    return {"size": size, "sha256_ends": digest.hexdigest()}


class BatchInput:
    """An async iterator over the requests of a batch file.

    A thread reads, decompresses and parses, a bit ahead: so many lines and so many bytes.

    Args:
        path: The file, or ``-``.

    Raises:
        InvalidFileError: It is missing, a folder, empty or not readable.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open_input(path)
        self._lines: deque[tuple[BatchLine | BadLine, int]] = deque()
        self._bytes = 0  # of the lines that were read ahead
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._ended = False
        self._arrived = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def ready(self) -> bool:
        """Whether a line is there already: reading on does not wait."""
        return bool(self._lines)

    @property
    def is_live(self) -> bool:
        """Whether somebody may still be writing it, so that the next line may be long in coming."""
        return self._path == STANDARD or not Path(self._path).is_file()

    async def __aiter__(self) -> AsyncIterator[BatchLine | BadLine]:
        """Yield the lines in order.

        Yields:
            Requests, and lines that are none.

        Raises:
            InvalidFileError: The file holds no JSON object, or broke off while it was read.
        """
        self._loop = asyncio.get_running_loop()
        # A daemon: a read of standard input cannot be interrupted.
        threading.Thread(target=self._read, name="promptmill batch reader", daemon=True).start()
        while True:
            with self._changed:
                taken = self._lines.popleft() if self._lines else None
                if taken is not None:
                    self._bytes -= taken[1]
                    self._changed.notify()
                elif self._ended:
                    break
                else:
                    self._arrived.clear()
            if taken is not None:
                yield taken[0]
            else:
                await self._arrived.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop reading; idempotent."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._path != STANDARD:
            self._file.close()

    def __enter__(self) -> Self:
        """Return the input itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading."""
        self.close()

    def _read(self) -> None:
        try:
            self._parse_all()
        except BROKEN as exc:
            if not self._stopped:
                self._error = InvalidFileError(f"broke off: {exc}", path=self._path)
        except BaseException as exc:  # noqa: BLE001  raised again where the lines are read
            self._error = exc
        finally:
            with self._changed:
                self._ended = True
            self._tell()

    def _parse_all(self) -> None:
        parser = BatchParser()
        strange: list[BadLine] | None = []
        for number, raw in lines_of(self._path, self._file):
            line = parser.parse(number, raw)
            if strange is not None:
                if isinstance(line, BadLine) and not line.is_object:
                    strange.append(line)
                    if len(strange) < _MOST_STRANGE:
                        continue
                    raise _not_jsonl(self._path, strange)
                for bad in strange:
                    self._put(bad, 0)
                strange = None
            self._put(line, len(raw or b""))
            if self._stopped:
                return
        if strange is not None:
            raise _not_jsonl(self._path, strange)

    def _put(self, line: BatchLine | BadLine, size: int) -> None:
        with self._changed:
            # One line, however long, is always let in.
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or not self._lines
                    or (len(self._lines) < _AHEAD and self._bytes + size <= _AHEAD_BYTES)
                )
            )
            first = not self._lines
            self._lines.append((line, size))
            self._bytes += size
        if first:
            self._tell()

    def _tell(self) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._arrived.set)
