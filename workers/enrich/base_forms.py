"""The base form of one token: what spaCy says, corrected by the dictionary and by spelling rules.

A small tagger lemmatises "coding" as "cod" and "hates" as "hat"; the dictionary alone reads "need"
as the past of "nee" and "filled" as that of "fille". Each knows where the other is wrong.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from workers.enrich import closed_class as closed

if TYPE_CHECKING:
    from workers.engine.protocols import Token
    from workers.enrich.lexicon import Lexicon

_GRADED = frozenset({"JJR", "JJS", "RBR", "RBS"})

#: Tags of verbs as the dictionary has them.
_BARE = frozenset({"VB", "VBP"})

#: One short vowel before one consonant: it doubles before "-ed" and "-ing".
_DOUBLES = re.compile(r"[^aeiou]*[aeiou][^aeiouwxy]\Z")

#: After these a third person takes "-es".
_HISSES = re.compile(r"(s|x|z|ch|sh|o)\Z")

#: "u.s.a.", "ph.d": letters with full stops between them.
_DOTTED = re.compile(r"[a-z]{1,2}(\.[a-z])+\.?\Z")


def base_form(token: Token, lexicon: Lexicon) -> str:
    """Return the base form of a token.

    Args:
        token: With its part of speech, tag and lemma.
        lexicon: The dictionary.

    Returns:
        In lower case.
    """
    word = token.text.lower()
    if (auxiliary := closed.AUXILIARIES.get(word)) is not None:
        return auxiliary  # "does", which a tagger in doubt takes for the plural of "doe"
    if _DOTTED.match(word):
        return word.replace(".", "")
    if token.pos == "VERB":
        if token.tag in _BARE and word in lexicon:
            return word
        lemma = token.lemma.lower()
        if lemma in lexicon and _inflects(lemma, word):
            return lemma
    base: str = lexicon.base(word.removesuffix("(s"), token.pos, token.tag in _GRADED)
    if base not in lexicon and token.pos == "PROPN":
        # A misread common noun at the start of a sentence or in a title.
        base = lexicon.base(word, "NOUN")
    return base


def _inflects(verb: str, word: str) -> bool:
    """Whether `word` can be a form of `verb` by the rules of spelling."""
    ending = word[len(verb) :] if word.startswith(verb) else ""
    if ending in {"ed", "ing"}:
        return not _DOUBLES.match(verb)
    if ending == "es":
        return _HISSES.search(verb) is not None
    return True
