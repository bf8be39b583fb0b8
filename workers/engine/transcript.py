"""`Transcript`: everything a generation has said so far, from which every reader gets own copies.

vLLM merges a `RequestOutput` in place when its reader lags, so an object shared between readers
changes under them. Here the native outputs are taken apart as they come, and each reader builds its
own outputs from a `Cursor`: a late reader gets the stream from its start, a lagging one what it
missed in one piece, and nobody holds an object of somebody else's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind


@dataclass
class _Choice:
    """One completion, whole so far."""

    latest: CompletionOutput  # the last native piece: what does not accumulate is read from it
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: Any = None
    sampling_mask: Any = None
    pieces: int = 0

    def add(self, piece: CompletionOutput) -> None:
        self.latest = piece
        self.pieces += 1
        self.text.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        if piece.logprobs:
            if self.logprobs is None:
                self.logprobs = copy.copy(piece.logprobs)
            else:
                self.logprobs.extend(piece.logprobs)
        if piece.sampling_mask is not None:
            if self.sampling_mask is None:
                self.sampling_mask = copy.deepcopy(piece.sampling_mask)
            else:
                self.sampling_mask.token_ids.extend(piece.sampling_mask.token_ids)


@dataclass
class _Read:
    """How much of one completion a reader has seen."""

    pieces: int = 0
    tokens: int = 0


@dataclass
class Cursor:
    """How far one reader has come."""

    kind: RequestOutputKind
    reads: dict[int, _Read] = field(default_factory=dict)
    finished: bool = False
    started: bool = False


class Transcript:
    """The outputs of one generation, added as deltas (or as one final output)."""

    def __init__(self) -> None:
        self.choices: dict[int, _Choice] = {}
        self.head: RequestOutput | None = None
        self.prompt_logprobs: Any = None
        self.prompt_token_id_logprobs: Any = None
        self.finished = False

    def add(self, output: RequestOutput) -> None:
        """Take in a native output.

        Args:
            output: Deltas since the last one, or the only, final output.
        """
        self.head = output
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.prompt_token_id_logprobs is not None:
            self.prompt_token_id_logprobs = output.prompt_token_id_logprobs
        for piece in output.outputs:
            if (choice := self.choices.get(piece.index)) is None:
                choice = self.choices[piece.index] = _Choice(latest=piece)
            choice.add(piece)
        self.finished = self.finished or output.finished

    @property
    def aborted(self) -> bool:
        """Whether any completion ended by an abort."""
        return any(choice.latest.finish_reason == "abort" for choice in self.choices.values())

    def has_news(self, cursor: Cursor) -> bool:
        """Whether `read` would return an output.

        Args:
            cursor: Of the reader.
        """
        if self.head is None or cursor.finished:
            return False
        if self.finished:
            return True
        if cursor.kind == RequestOutputKind.FINAL_ONLY:
            return False
        return any(
            choice.pieces > cursor.reads.get(index, _Read()).pieces
            for index, choice in self.choices.items()
        )

    def read(self, cursor: Cursor, request_id: str) -> RequestOutput | None:
        """Return what the reader has not seen yet, as an output of its own.

        Args:
            cursor: Of the reader; moved on.
            request_id: The reader's own.

        Returns:
            A new output in the reader's kind, or None when there is nothing new.
        """
        if not self.has_news(cursor) or self.head is None:
            return None
        delta = cursor.kind == RequestOutputKind.DELTA
        outputs = []
        for index, choice in sorted(self.choices.items()):
            seen = cursor.reads.setdefault(index, _Read())
            if delta and seen.pieces == choice.pieces:
                continue
            outputs.append(_piece(choice, seen if delta else _Read()))
            seen.pieces, seen.tokens = choice.pieces, len(choice.token_ids)
        output = copy.copy(self.head)
        output.request_id = request_id
        output.outputs = outputs
        output.finished = self.finished
        first = not cursor.started
        output.prompt_logprobs = _own(self.prompt_logprobs) if first or not delta else None
        output.prompt_token_id_logprobs = (
            self.prompt_token_id_logprobs if first or not delta else None
        )
        if output.prompt_token_ids is not None:
            output.prompt_token_ids = list(output.prompt_token_ids)
        cursor.started = True
        cursor.finished = self.finished
        return output


def _piece(choice: _Choice, seen: _Read) -> CompletionOutput:
    """Copy a completion from where `seen` stands to where it is now."""
    piece = copy.copy(choice.latest)
    piece.text = "".join(choice.text[seen.pieces :])
    piece.token_ids = choice.token_ids[seen.tokens :]
    if choice.logprobs is not None:
        piece.logprobs = _own(choice.logprobs[seen.tokens :])
    if choice.sampling_mask is not None:
        piece.sampling_mask = copy.copy(choice.sampling_mask)
        piece.sampling_mask.token_ids = choice.sampling_mask.token_ids[seen.tokens :]
    return piece


def _own(logprobs: Any) -> Any:
    """Copy log probabilities, since readers change them: vLLM's handlers cut off minus infinity."""
    if not isinstance(logprobs, list):
        return copy.copy(logprobs)
    return [
        position and {token: copy.copy(one) for token, one in position.items()}
        for position in logprobs
    ]
