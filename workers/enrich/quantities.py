"""Numbers and dates in a prompt, each in one spelling."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from workers.enrich import closed_class as closed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from workers.engine.protocols import Token

#: What may stand around a number.
_AROUND = "$\u00a3\u20ac\u20b9#.'\u2019-+"

_DIGIT = re.compile(r"\d")

#: An amount with its currency stuck to it: "rs.200", "2000rs", "us$5".
_PRICED = re.compile(
    r"(?:(?:rs|inr|usd|us\$|eur|gbp)\.?)?(\d[\d.,]*)(?:rs|inr|usd|eur|gbp)?\.?\Z", re.ASCII
)

_SIGNS = frozenset("+-*/<>=^%") | {"\u2212", "\u00d7", "\u00f7", "<=", ">=", "==", "!=", "**"}

#: What makes another name of a letter, as in "C#".
_SUFFIXES = frozenset({"#", "++"})

_CURRENCIES = frozenset("$\u00a3\u00a5\u20ac\u20b9")

#: Roman numerals from II to XXXIX; "I" alone is a pronoun.
_ROMAN = re.compile(r"(?=[IVX]{2})(X{0,3})(IX|IV|V?I{0,3})\Z")
_ROMAN_VALUES = {"I": 1, "V": 5, "X": 10}


def numbers(tokens: Sequence[Token]) -> Iterator[str]:
    """Yield every number as digits.

    Args:
        tokens: Of one text.
    """
    for token in tokens:
        word = token.text.lower()
        if _DIGIT.search(word):
            priced = _PRICED.match(word)
            bare = (priced[1] if priced else word).replace(",", "").strip(_AROUND)
            yield bare.removesuffix(".0") or word
        elif word in closed.NUMBERS and token.pos in {"NUM", "ADJ", "NOUN"}:
            yield closed.NUMBERS[word]
        elif is_roman(token):
            yield str(_value(token.text))


def is_roman(token: Token) -> bool:
    """Whether a token is a Roman numeral, as in "World War II"."""
    return _ROMAN.match(token.text) is not None


def _value(numeral: str) -> int:
    values = [_ROMAN_VALUES[letter] for letter in numeral]
    return sum(
        -value if value < following else value
        for value, following in zip(values, [*values[1:], 0], strict=True)
    )


def signs(tokens: Sequence[Token]) -> Iterator[str]:
    """Yield the signs of sums and comparisons, as in "8 - 4" and "x < 3", and that of "C#".

    Args:
        tokens: Of one text; a dash or a slash between words is none.
    """
    for at, token in enumerate(tokens):
        before, after = tokens[max(0, at - 1)], tokens[min(at + 1, len(tokens) - 1)]
        sums = token.text in _SIGNS and _is_operand(before) and _is_operand(after)
        if sums or (token.text in _SUFFIXES and len(before.text) == 1 and before.text.isalpha()):
            yield token.text


def currencies(tokens: Sequence[Token]) -> frozenset[str]:
    """Return the signs of currencies.

    Args:
        tokens: Of one text.
    """
    return frozenset(letter for token in tokens for letter in token.text if letter in _CURRENCIES)


def _is_operand(token: Token) -> bool:
    return len(token.text) == 1 or _DIGIT.search(token.text) is not None


def dates(words: Sequence[str]) -> frozenset[str]:
    """Return months, weekdays, today and the like.

    Args:
        words: Of one text in lower case, as written and as base forms.
    """
    return frozenset(closed.DATES.intersection(words))
