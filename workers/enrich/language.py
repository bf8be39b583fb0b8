"""A cheap guess at a text's language: by script, then by the function words that spaCy lists."""

from __future__ import annotations

import importlib.util
import runpy
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Languages written in Latin script that are told apart by their function words.
_LATIN = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl", "ro", "fi", "tr", "id")

#: First word of a letter's Unicode name, and the language guessed for it.
_SCRIPTS = {
    "CJK": "zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CYRILLIC": "ru",
    "ARABIC": "ar",
    "HEBREW": "he",
    "GREEK": "el",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
}

#: Letters and words that are looked at.
_SAMPLE = 400

#: Another language has to show this many more function words than the default.
_MARGIN = 2


class LanguageGuess:
    """Guesses languages.

    Args:
        default: Code of the language that a text is taken for unless another one clearly shows.
    """

    def __init__(self, default: str = "en") -> None:
        self._default = default
        self._stop_words = {code: _stop_words(code) for code in dict.fromkeys((default, *_LATIN))}

    def of(self, text: str, words: Sequence[str]) -> str:
        """Guess one text's language.

        Args:
            text: The text.
            words: Its words in lower case.

        Returns:
            A code of ISO 639-1.
        """
        script = _script(text)
        if script != "LATIN":
            return _SCRIPTS.get(script, self._default)
        sample = words[:_SAMPLE]
        counts = {
            code: sum(word in stop_words for word in sample)
            for code, stop_words in self._stop_words.items()
        }
        best = max(counts, key=lambda code: counts[code])
        if counts[best] < counts[self._default] + _MARGIN:
            return self._default
        return best


def _stop_words(code: str) -> frozenset[str]:
    """Return spaCy's function words of a language.

    From the file alone: to import French as a package takes seconds, for its tokenizer.
    """
    package = importlib.util.find_spec("spacy.lang")
    if package is None or package.origin is None:
        return frozenset()
    path = Path(package.origin).parent / code / "stop_words.py"
    return frozenset(runpy.run_path(str(path))["STOP_WORDS"])


def _script(text: str) -> str:
    """Return the script of most letters; kana decides for Japanese, whatever else there is."""
    letters = [char for char in text[:_SAMPLE] if char.isalpha()]
    if text.isascii() or not letters:
        return "LATIN"
    counts = Counter(unicodedata.name(char, "LATIN").split()[0] for char in letters)
    if kana := counts["HIRAGANA"] + counts["KATAKANA"]:
        counts["HIRAGANA"] = kana + counts.pop("CJK", 0)
    return counts.most_common(1)[0][0]
