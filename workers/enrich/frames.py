"""The bytes between a worker and its child processes: length-prefixed frames, and no pickle.

A request is one JSON list of texts. A reply is one frame a text: its place in the request, whether
it went well, and the payload (JSON of an analysis, raw float32 of a vector, or an error message).
The child's first frame says that its model is loaded, or why not.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

_REQUEST = struct.Struct("!I")
_REPLY = struct.Struct("!I?I")

REQUEST_HEADER_BYTES = _REQUEST.size
REPLY_HEADER_BYTES = _REPLY.size

#: Place in the request that stands for "ready", the child's first frame.
READY = 2**32 - 1


class Readable(Protocol):
    """A blocking, buffered stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        ...


@dataclass(frozen=True, kw_only=True)
class ReplyHeader:
    """What precedes a reply's payload."""

    index: int  # place in the request, or READY
    ok: bool  # False: the payload is an error message
    size: int  # bytes of payload that follow


def pack_request(texts: Sequence[str]) -> bytes:
    """Return a request frame for `texts`."""
    # Half a surrogate pair cannot be written as UTF-8; as JSON's \\ud800 it goes through.
    body = json.dumps(list(texts)).encode("ascii")
    return _REQUEST.pack(len(body)) + body


def read_request(stream: Readable) -> list[str] | None:
    """Read one request.

    Args:
        stream: The socket.

    Returns:
        The texts, or None when the other side has closed.
    """
    header = stream.read(_REQUEST.size)
    if len(header) < _REQUEST.size:
        return None
    size = _REQUEST.unpack(header)[0]
    body = stream.read(size)
    if len(body) < size:
        return None
    texts: list[str] = json.loads(body)
    return texts


def pack_reply(index: int, payload: bytes, *, ok: bool = True) -> bytes:
    """Return a reply frame."""
    return _REPLY.pack(index, ok, len(payload)) + payload


def unpack_reply_header(header: bytes) -> ReplyHeader:
    """Read what `pack_reply` wrote first."""
    index, ok, size = _REPLY.unpack(header)
    return ReplyHeader(index=index, ok=ok, size=size)
