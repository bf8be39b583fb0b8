"""The order in which rows are submitted: those that begin alike go next to each other.

vLLM keeps what it computed for the beginning of a prompt, and the oldest goes when room is needed.
Rows of one system prompt or one document that come far apart find nothing any more; side by side
all but the first begin where it ended. So a stretch of the input is read ahead and sorted.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import orjson

from schema.jobs import Reuse
from schema.openai_batch import BadLine, BatchLine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from workers.batch_input import BatchInput

#: Rows of one stretch, and bytes of their input lines.
STRETCH_ROWS = 2048
STRETCH_BYTES = 32 * 2**20
# Beginnings that are equal up to here count as equal.
_KEY_CHARS = 4096
_POOLED = ("/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank")


async def stretches(rows: BatchInput, *, most_rows: int) -> AsyncIterator[list[Any]]:
    """Yield the input in stretches, each to be put in order.

    A file is read on until a stretch is full. Of what somebody is still writing only that is
    taken which is there: a row must not wait for others that may come in an hour.

    Args:
        rows: The input.
        most_rows: Rows of a stretch at most.

    Yields:
        Lists of `BatchLine` and `BadLine`, in the order of the input.
    """
    stretch: list[BatchLine | BadLine] = []
    size = 0
    async for line in rows:
        stretch.append(line)
        size += line.size if isinstance(line, BatchLine) else 0
        full = len(stretch) >= min(most_rows, STRETCH_ROWS) or size >= STRETCH_BYTES
        if full or (rows.is_live and not rows.ready):
            yield stretch
            stretch, size = [], 0
    if stretch:
        yield stretch


def beginning(line: BatchLine | BadLine) -> str:
    """Return what a row is sorted by: how its prompt begins.

    Args:
        line: The row.
    """
    if isinstance(line, BadLine):
        return ""
    body = line.body
    if isinstance(messages := body.get("messages"), list):
        parts = [_plain(body["tools"])] if body.get("tools") else []
        length = 0
        for turn in messages:
            content = turn.get("content") if isinstance(turn, dict) else turn
            parts.append(content if isinstance(content, str) else _plain(content))
            length += len(parts[-1])
            if length > _KEY_CHARS:
                break
        return "\x00".join(parts)[:_KEY_CHARS]
    prompt = body.get("prompt")
    return (prompt if isinstance(prompt, str) else _plain(prompt))[:_KEY_CHARS]


def _plain(value: object) -> str:
    return "" if value is None else orjson.dumps(value, default=str).decode()


def request_digest(url: str, body: dict[str, Any]) -> bytes:
    """Return a digest of what a row asks; equal rows have equal ones.

    Args:
        url: Path of the endpoint.
        body: As it will be submitted.
    """
    return hashlib.sha256(orjson.dumps([url, body], option=orjson.OPT_SORT_KEYS)).digest()


def asked(url: str, body: dict[str, Any]) -> int:
    """Return 64 bits of `request_digest`: enough to tell whether a row was changed.

    Args:
        url: Path of the endpoint.
        body: As it stands in the file.
    """
    return int.from_bytes(request_digest(url, body)[:8])


def may_share(url: str, body: dict[str, Any], reuse: object) -> bool:
    """Whether two equal rows may be given one answer: it would be the same, or that is wished for.

    Args:
        url: Path of the endpoint.
        body: As it will be submitted.
        reuse: The job option, or None for its default.
    """
    if reuse == Reuse.OFF:
        return False
    if reuse == Reuse.ALWAYS or url in _POOLED:
        return True
    return body.get("temperature") == 0 or body.get("seed") is not None
