"""`LastTurn`: what a chat that was rendered into one text asks, and what stands around it.

A chat template writes its turns between special tokens of the model. So the same question under
another system prompt, or after other turns, can be told apart from what is asked, whichever
template made the text. All that is not taken for the question counts as surroundings, which must be
equal for an answer to be reused by meaning: a template that is read wrongly costs hits, and never
brings a wrong one.
"""

from __future__ import annotations

import re
from typing import Any

#: How a turn begins that the model is to write.
_ANSWER = re.compile(r"\s*(?:assistant|model)\s*(?:\n|$)")
#: How templates that write roles as words begin a turn of the user's.
_ROLE = re.compile(r"\s*(?:user|human)\s*\n")
_GAP = "\0"


class LastTurn:
    """Finds the last turn that somebody else than the model wrote.

    Args:
        tokenizer: Of the served model; None for one without.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        special = {str(token) for token in added.values() if getattr(token, "special", False)}
        special |= set(getattr(tokenizer, "all_special_tokens", None) or ())
        words = sorted(filter(None, special), key=len, reverse=True)
        self._mark = re.compile(f"({'|'.join(map(re.escape, words))})") if words else None

    def of(self, text: str) -> tuple[str, str] | None:
        """Return the question and its surroundings, or None for a text that is no chat.

        Args:
            text: As the model is given it.
        """
        if self._mark is None or len(pieces := self._mark.split(text)) == 1:
            return None
        if pieces[0].strip():
            return None  # templates begin with a mark; this one speaks of it
        # Texts and the marks between them, by turns.
        for at in range(len(pieces) - 1, -1, -2):
            piece = pieces[at]
            if piece.strip() and not _ANSWER.match(piece):
                role = _ROLE.match(piece)
                begin = role.end() if role is not None else 0
                before = "".join(pieces[:at]) + piece[:begin]
                return piece[begin:].strip(), before + _GAP + "".join(pieces[at + 1 :])
        return None
