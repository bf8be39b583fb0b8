"""The memory tier: bounded by entries and bytes, with a time to live."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from cachetools import TTLCache

from workers.engine.protocols import StoredAnswer

_ENTRY_OVERHEAD_BYTES = 2_000


def _bytes_of(answer: StoredAnswer) -> int:
    """Estimate what an answer takes in memory; a little too much rather than too little."""
    size = (
        _ENTRY_OVERHEAD_BYTES
        + len(answer.prompt or "")
        + _bytes_of_probabilities(answer.prompt_logprobs)
    )
    for completion in answer.completions:
        size += len(completion.text) + 36 * len(completion.token_ids)
        size += _bytes_of_probabilities(completion.logprobs)
    if answer.analysis is not None:
        size += 400 * len(answer.analysis.tokens) + len(answer.analysis.text)
    size += sum(300 + len(near.prompt) for near in answer.similar or ())
    size += sum(300 + part.vector.nbytes for part in answer.vectors)
    return size + _bytes_of_json(answer.pooled) + _bytes_of_json(answer.enrichments)


def _bytes_of_probabilities(positions: Sequence[Any] | None) -> int:
    return 120 * sum(len(position) for position in positions or () if position)


def _bytes_of_json(value: Any) -> int:
    """Estimate what JSON types take in memory: vectors of each token of a text, for example."""
    if isinstance(value, Mapping):
        return 100 * len(value) + sum(map(_bytes_of_json, value.values()))
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], float):  # a vector, and long
            return 64 + 32 * len(value)
        return 64 + sum(map(_bytes_of_json, value))
    return 32 + (len(value) if isinstance(value, str) else 0)


class MemoryCache:
    """Answers by namespace and fingerprint; the least recently used make room.

    Args:
        entries: How many answers at most; 0 keeps none.
        max_bytes: How many bytes at most, by estimate.
        ttl_s: Seconds after which an answer is looked up in the store again.
    """

    def __init__(self, *, entries: int, max_bytes: int, ttl_s: float) -> None:
        # One bound for both: an answer counts at least as much as its share of the entries.
        least = max_bytes / entries if entries else float("inf")
        self._empty: Callable[[], TTLCache[tuple[str, bytes], StoredAnswer]] = lambda: TTLCache(
            maxsize=max_bytes, ttl=ttl_s, getsizeof=lambda answer: max(_bytes_of(answer), least)
        )
        self._answers = self._empty()
        #: How often something was to be forgotten: who reads an answer elsewhere, to put it here,
        #: can tell by it that it may have been withdrawn meanwhile.
        self.forgettings = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def size_bytes(self) -> float:
        """Bytes in use, by estimate."""
        return self._answers.currsize

    def get(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        """Return a live answer, or None.

        Args:
            namespace: Tenant.
            fingerprint: 32 bytes.
        """
        answer = self._answers.get((namespace, fingerprint))
        if answer is None or (answer.expires_at is not None and answer.expires_at <= time.time()):
            return None
        return answer

    def put(self, answer: StoredAnswer) -> None:
        """Keep an answer; one too large for the whole tier is not kept.

        Args:
            answer: Whole.
        """
        key = (answer.namespace, answer.fingerprint)
        try:
            self._answers[key] = answer
        except ValueError:  # larger than the cache
            self._answers.pop(key, None)

    def complete(self, answer: StoredAnswer) -> None:
        """Put an answer in the place of its earlier self; one forgotten since stays forgotten.

        Args:
            answer: With more known of it than when it was put.
        """
        known = self._answers.get((answer.namespace, answer.fingerprint))
        if known is not None and known.id == answer.id:
            self.put(answer)

    def forget(
        self,
        *,
        namespace: str | None = None,
        answer_ids: frozenset[UUID] = frozenset(),
        tag: str | None = None,
        model: str | None = None,
    ) -> int:
        """Drop the answers that meet every condition given.

        Args:
            namespace: Of this tenant only; None is any.
            answer_ids: These only; empty is any.
            tag: With this tag only.
            model: Of this served model only.

        Returns:
            How many were dropped.
        """
        self.forgettings += 1
        doomed = [key for key in self._answers if namespace is None or key[0] == namespace]
        if answer_ids or tag is not None or model is not None:

            def meets(key: tuple[str, bytes]) -> bool:
                answer = self._answers.get(key)  # None when its time has just ended
                return (
                    answer is not None
                    and (not answer_ids or answer.id in answer_ids)
                    and (tag is None or tag in answer.tags)
                    and (model is None or answer.model == model)
                )

            doomed = [key for key in doomed if meets(key)]
        if len(doomed) == len(self._answers):
            # One by one, a full tier would stop the event loop for a tenth of a second.
            self._answers = self._empty()
        else:
            for key in doomed:
                self._answers.pop(key, None)
        return len(doomed)
