"""`Guard`: whether two prompts are the same question, by what their analyses hold.

A threshold on similarity cannot tell "turn the light on" from "turn the light off". The guard
refuses a pair as soon as one thing differs that changes the answer, and says which.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from workers.engine.protocols import Verdict
from workers.enrich.lexicon import Lexicon
from workers.enrich.reading import Reading, read
from workers.enrich.rules import RULES, unmatched

if TYPE_CHECKING:
    from workers.engine.protocols import Analysis

#: Readings kept: the asked prompt is read once for all its candidates.
_KEPT = 2048


class Guard:
    """Compares prompts by rule. It keeps no state but what it has read lately.

    Args:
        lexicon: Relations between words; the packaged one unless given.
    """

    def __init__(self, lexicon: Lexicon | None = None) -> None:
        self._lexicon = lexicon or Lexicon.load()
        self._readings: OrderedDict[tuple[str, str], Reading] = OrderedDict()

    def check(self, asked: Analysis, stored: Analysis) -> Verdict:
        """Decide whether the stored prompt's answer may be given to the asked one.

        Args:
            asked: Analysis of the prompt that waits for an answer.
            stored: Analysis of the prompt that has one.

        Returns:
            Allowed, or refused with the name of the rule (see `rules.RULES`) and what differed.
        """
        if asked.text == stored.text:
            return Verdict(allowed=True)
        if asked.pipeline != stored.pipeline:
            detail = f"analysed by {asked.pipeline} and {stored.pipeline}"
            return Verdict(allowed=False, rule="incomparable", detail=detail)
        one, other = self._read(asked), self._read(stored)
        for name, rule in RULES.items():
            reason = rule(one, other, self._lexicon)
            if reason is not None:
                return Verdict(allowed=False, rule=name, detail=reason)
        return Verdict(allowed=True, added=sum(map(len, unmatched(one, other, self._lexicon))))

    def _read(self, analysis: Analysis) -> Reading:
        key = (analysis.pipeline, analysis.text)
        reading = self._readings.get(key)
        if reading is None:
            reading = self._readings[key] = read(analysis, self._lexicon)
            if len(self._readings) > _KEPT:
                self._readings.popitem(last=False)
        return reading
