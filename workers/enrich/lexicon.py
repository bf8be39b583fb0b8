"""How two English words are related: the same base form, near in meaning, or opposites.

The words come from WordNet 3.0 (see `lexicon_build`), cut down to what the guard asks.
"""

from __future__ import annotations

import functools
import gzip
from collections.abc import Mapping
from pathlib import Path

_DATA = Path(__file__).parent / "data" / "wordnet.tsv.gz"

# WordNet's own rules of detachment (morphy(7WN)), by universal part of speech.
_NOUN = (("s", ""), ("ies", "y"), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
         ("shes", "sh"), ("men", "man"))  # fmt: skip
_VERB = (("ies", "y"), ("es", "e"), ("es", ""), ("s", ""), ("ed", "e"), ("ed", ""),
         ("ing", "e"), ("ing", ""))  # fmt: skip
_GRADE = (("ier", "y"), ("iest", "y"), ("er", "e"), ("est", "e"), ("er", ""), ("est", ""))
_ENDINGS = {
    "NOUN": (*_NOUN, *_VERB),
    "PROPN": _NOUN,
    "VERB": (*_VERB, *_NOUN),
    "AUX": _VERB,
    "ADJ": _VERB,
    "ADV": (),
}

#: Part of speech in WordNet's files.
_PARTS = {"NOUN": "n", "VERB": "v", "AUX": "v", "ADJ": "a", "ADV": "r"}

_KIND, _NEAR, _OPPOSITE, _IRREGULAR = range(4)

#: Converses, which WordNet holds for the same or for unrelated.
_CONVERSE = frozenset(
    frozenset(pair.split("/"))
    for pair in ("teach/learn", "cause/effect", "lend/borrow", "buy/sell", "imply/infer")
)

#: Prefixes that turn a word into its opposite: install and uninstall, like and dislike.
_REVERSING = ("un", "in", "im", "il", "ir", "dis", "non", "de", "mis", "anti")

#: What may cling to a word's ends.
_EDGES = "'\u2019.-_`\"*"

#: Nothing shorter is left of a word: "do" and "be" have irregular forms only.
_MIN_STEM_LETTERS = 3

#: Words of fewer letters are too short to tell a slip of the pen from another word.
_MIN_TYPO_LETTERS = 5


#: A family of words has so many letters in common, at least.
_MIN_FAMILY_LETTERS = 4

#: Endings of those who do a thing or have it done to them, of beliefs and of trades.
_APART = ("er", "or", "ee", "ist", "ism", "eering")


class Lexicon:
    """Relations between words.

    Args:
        rows: For each word the rest of its row in the table, as `load` reads it.
    """

    def __init__(self, rows: Mapping[str, str]) -> None:
        self._rows = rows
        self.base = functools.lru_cache(maxsize=50_000)(self._base)
        self.near = functools.lru_cache(maxsize=50_000)(self._near)
        self.akin = functools.lru_cache(maxsize=50_000)(self._akin)
        self.opposite = functools.lru_cache(maxsize=50_000)(self._opposite)

    @staticmethod
    @functools.cache
    def load() -> Lexicon:
        """Read the packaged table once a process; about 100 ms and 20 MB."""
        table = gzip.decompress(_DATA.read_bytes()).decode("ascii")
        return Lexicon(dict(line.split("\t", 1) for line in table.splitlines()))

    def __contains__(self, word: str) -> bool:
        """Whether the dictionary has the word, in lower case, as a base form."""
        row = self._rows.get(word)
        return row is not None and not row.startswith("-")

    def words(self) -> list[str]:
        """Return all base forms, in order of the alphabet."""
        return [word for word in self._rows if word in self]

    def is_name(self, word: str) -> bool:
        """Whether a word, in lower case, is only ever written with a capital."""
        return self._rows.get(word, "").startswith("N")

    def _base(self, word: str, pos: str, graded: bool = False) -> str:
        """Return the base form of a word.

        Args:
            word: Any form, any case.
            pos: Universal part of speech; it decides which endings may come off.
            graded: Whether it is a comparative or superlative.

        Returns:
            In lower case; the word itself when nothing shorter is in the dictionary.
        """
        word = word.lower().strip(_EDGES)
        # In order: a set's own changes with every process.
        irregulars = sorted(self._cell(word, _IRREGULAR))
        of_its_kind = [one for one in irregulars if one[0] == _PARTS.get(pos)]
        if of_its_kind or (irregulars and word not in self):
            return (of_its_kind or irregulars)[0][2:]
        if word.endswith("ss") or (word in self and pos == "PROPN"):
            return word
        endings = _ENDINGS.get(pos, ())
        if word in self and pos == "NOUN":
            endings = _NOUN  # "thing" and "building" are words of their own
        for ending, instead in (*(_GRADE if graded else ()), *endings):
            if not word.endswith(ending):
                continue
            stem = word[: len(word) - len(ending)] + instead
            if len(stem) >= _MIN_STEM_LETTERS and stem in self:
                return stem
            if not instead and len(stem) > 3 and stem[-1] == stem[-2] and stem[:-1] in self:
                return stem[:-1]  # the doubled consonant of "running"
        return word

    def _near(self, one: str, other: str) -> bool:
        """Whether one of two base forms may stand for the other.

        They share a sense, are similar adjectives, are derived from each other, or one is the
        narrow kind that the other is one of; or they are one word, misspelt.
        """
        return self.related(one, other) or self._is_typo(one, other)

    def related(self, one: str, other: str) -> bool:
        """As `near`, without misspellings: two names may differ by one letter."""
        if other in self._cell(one, _NEAR) or one in self._cell(other, _NEAR):
            return not self.opposite(one, other)
        return False

    def _akin(self, one: str, other: str) -> bool:
        """Whether two base forms belong to one family: "success" and "successful".

        They begin alike and are both derived from one word that begins so. Those who do a thing
        are not the thing, nor is a belief: "trainee" and "training" are two.
        """
        stem = one[:_MIN_FAMILY_LETTERS]
        if other[:_MIN_FAMILY_LETTERS] != stem or one.endswith(_APART) or other.endswith(_APART):
            return False
        shared = self._cell(one, _NEAR) & self._cell(other, _NEAR)
        return any(word.startswith(stem) for word in shared) and not self.opposite(one, other)

    def _opposite(self, one: str, other: str) -> bool:
        """Whether two base forms are opposites, directly or by a prefix."""
        if other in self._cell(one, _OPPOSITE) or one in self._cell(other, _OPPOSITE):
            return True
        if frozenset((one, other)) in _CONVERSE:
            return True
        short, long = sorted((one, other), key=len)
        return len(short) > 2 and any(long == prefix + short for prefix in _REVERSING)

    def _cell(self, word: str, column: int) -> frozenset[str]:
        row = self._rows.get(word)
        return frozenset() if row is None else frozenset(row.split("\t")[column].split())

    def _is_typo(self, one: str, other: str) -> bool:
        """Whether one is no word and reads as the other with one slip of the pen."""
        if one in self and other in self:
            return False
        if one + "s" == other or other + "s" == one:
            return True  # "app" and "apps", where the dictionary has one of them at most
        if min(len(one), len(other)) < _MIN_TYPO_LETTERS or one[0] != other[0]:
            return False
        if not (one in self or other in self):
            return False  # two unknown words are two names
        return one.isalpha() and other.isalpha() and _one_slip(one, other)


def _one_slip(one: str, other: str) -> bool:
    """Whether a letter is missing, added, changed, or two neighbours are swapped."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    first, second = one[start:], other[start:]
    return (
        first[1:] == second[1:]
        or first[1:] == second
        or first == second[1:]
        or (first[:2] == second[:2][::-1] and first[2:] == second[2:])
    )
