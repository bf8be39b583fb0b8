"""What the guard reads out of one analysis: numbers, names, negation, content words and roles."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from workers.enrich import closed_class as closed
from workers.enrich import quantities
from workers.enrich.base_forms import base_form
from workers.enrich.lexicon import Lexicon

if TYPE_CHECKING:
    from workers.engine.protocols import Analysis, Token

_DIGIT = re.compile(r"\d")
_LETTER = re.compile(r"[^\W\d_]")

#: "in two lines", "in at most 50 words".
_LENGTH = re.compile(
    r"\b(?:in|within|under|most|least|exactly)\s+(?:an?|\w+)\s+(?:short\s+)?"
    r"(word|sentence|line|paragraph|page|bullet|chapter)s?\b",
    re.IGNORECASE,
)

#: Entities that are amounts or times: the numbers and dates say what matters of them.
_AMOUNTS = frozenset({"CARDINAL", "DATE", "MONEY", "ORDINAL", "PERCENT", "QUANTITY", "TIME"})

_TENSES = {"VBD": "past", "VBZ": "present", "VBP": "present"}

_NO_ROLE = frozenset({"DET", "PUNCT", "AUX", "PART", "CCONJ", "SCONJ", "ADP"})

#: Relations to a head, as the guard compares them; passive voice is turned round.
_ROLES = {
    "nsubj": "subject",
    "csubj": "subject",
    "agent": "subject",
    "nsubjpass": "object",
    "csubjpass": "object",
    "dobj": "object",
    "obj": "object",
    "dative": "dative",
    "poss": "of",
    "attr": "attribute",
    "acomp": "attribute",
    "oprd": "attribute",
    "amod": "modifier",
    "compound": "modifier",
    "nmod": "modifier",
}


@dataclass(frozen=True, kw_only=True)
class Role:
    """What one word does in its clause."""

    label: str  # subject, object, … or the preposition it stands with
    head: str  # base form of the word it depends on


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One prompt as the rules see it. Words are base forms in lower case."""

    language: str
    truncated: bool
    question: bool  # it asks, rather than states or orders
    polar: bool  # it asks for yes or no
    tense: str  # of "be" as main verb or in a passive: present or past
    numbers: Counter[str]
    dates: frozenset[str]  # months, weekdays, today and the like
    signs: tuple[str, ...]  # those of sums and comparisons, as they follow each other
    currencies: frozenset[str]
    names: frozenset[str]
    given_names: frozenset[str]  # those of the names that a person's other name follows
    uncapped: frozenset[str]  # words without a capital
    words: frozenset[str]  # every word, as written and as base form
    negations: int
    asked_for: frozenset[str]  # kinds of question word: who, when, how many, …
    quantifiers: frozenset[str]
    formats: frozenset[str]  # what the answer is to look like
    compares: frozenset[str]  # "than", or "as" of "as tall as"
    content: tuple[str, ...]  # words that carry content, each once, in order
    light: frozenset[str]  # words that say little in a question
    modality: frozenset[str]  # whether something may be, or has to be
    initials: str  # first letters of its words; a space where a function word stands
    joined: Mapping[str, tuple[str, str]]  # each two neighbours written as one word
    passive: bool  # somewhere a passive voice turns subject and object round
    order: tuple[str, ...]  # all words that carry content, as they follow each other
    grammar: Counter[str]  # closed-class words that have an opposite
    roles: tuple[tuple[str, Role], ...]


def read(analysis: Analysis, lexicon: Lexicon) -> Reading:
    """Read one analysis.

    Args:
        analysis: Made by the same pipeline as the one it is to be compared with.
        lexicon: Base forms and names.

    Returns:
        What the rules compare.
    """
    tokens = analysis.tokens
    lowers = [token.text.lower() for token in tokens]
    bases = [base_form(token, lexicon) for token in tokens]
    question = _is_question(analysis.text, tokens)
    names = frozenset(_names(tokens, bases, lexicon))
    framing = _framing(tokens, lowers) if question else set()
    carrying = [
        (base, token)
        for at, (base, token) in enumerate(zip(bases, tokens, strict=True))
        if at not in framing and _carries_content(base, token)
    ]
    light = frozenset(base for base, _ in carrying if base in closed.LIGHT)
    skipped = closed.LIGHT if question else closed.EMPTY
    return Reading(
        language=analysis.language,
        truncated=analysis.truncated,
        question=question,
        polar=question and bool(tokens) and tokens[0].pos == "AUX",
        tense=_tense(tokens, bases),
        numbers=Counter(quantities.numbers(tokens)),
        dates=quantities.dates([*lowers, *bases]),
        signs=tuple(quantities.signs(tokens)),
        currencies=quantities.currencies(tokens),
        names=names,
        given_names=frozenset(
            base
            for token, base in zip(tokens, bases, strict=True)
            if token.ent == "PERSON" and token.dep == "compound"
        ),
        uncapped=frozenset(
            base for token, base in zip(tokens, bases, strict=True) if not token.text[0].isupper()
        ),
        words=frozenset([*lowers, *bases]),
        negations=_negations(lowers),
        asked_for=frozenset(_asked_for(tokens, lowers)),
        quantifiers=frozenset(
            closed.QUANTIFIERS[word] for word in lowers if word in closed.QUANTIFIERS
        ),
        formats=frozenset(closed.FORMATS & {*lowers, *bases}) | _lengths(analysis.text),
        compares=frozenset(_compares(lowers)),
        content=tuple(dict.fromkeys(base for base, _ in carrying if base not in skipped)),
        light=light,
        modality=frozenset(closed.MODALITY[word] for word in lowers if word in closed.MODALITY),
        initials=_initials(tokens),
        joined=_joined(lowers, bases),
        passive=any(token.dep in {"auxpass", "nsubjpass", "agent"} for token in tokens),
        order=tuple(base for base, _ in carrying),
        grammar=Counter(
            word
            for token, word in zip(tokens, lowers, strict=True)
            if word in closed.OPPOSED and not (word == "in" and token.dep == "prep")
        ),
        roles=tuple(_roles(tokens, bases)),
    )


def _is_question(text: str, tokens: tuple[Token, ...]) -> bool:
    if "?" in text:
        return True
    first = tokens[0] if tokens else None
    return first is not None and (first.tag in {"WP", "WRB", "WDT", "WP$", "MD"})


def _tense(tokens: tuple[Token, ...], bases: list[str]) -> str:
    for token, base in zip(tokens, bases, strict=True):
        if base == "be" and token.dep in {"ROOT", "auxpass"} and token.tag in _TENSES:
            return _TENSES[token.tag]
    return ""


def _carries_content(base: str, token: Token) -> bool:
    if token.pos in closed.FUNCTION_POS or base in closed.NEGATIONS:
        return False
    if quantities.is_roman(token):
        return False
    return bool(_LETTER.search(base)) and not _DIGIT.search(base)


def _framing(tokens: tuple[Token, ...], lowers: list[str]) -> set[int]:
    """Find phrases that frame any question, and the "written" of "the best ever written"."""
    found: set[int] = set()
    for at, word in enumerate(lowers):
        for phrase in closed.FRAMES.get(word, ()):
            if tuple(lowers[at : at + len(phrase)]) == phrase:
                found.update(range(at, at + len(phrase)))
        if word == "ever" and at + 1 < len(tokens) and tokens[at + 1].tag == "VBN":
            found.add(at + 1)
    return found


def _names(tokens: tuple[Token, ...], bases: list[str], lexicon: Lexicon) -> Iterator[str]:
    """Find the words that name one thing in the world.

    A small tagger takes many capitals for names. A capital is a sign only inside a sentence that
    is not written in capitals throughout; elsewhere the dictionary decides.
    """
    letters = [token for token in tokens if _LETTER.search(token.text)]
    capitals = sum(token.text[0].isupper() for token in letters)
    shouting = len(letters) > 3 and capitals > 0.6 * len(letters)
    for token, base in zip(tokens, bases, strict=True):
        if not _LETTER.search(token.text) or _DIGIT.search(token.text):
            continue
        if quantities.is_roman(token):
            continue
        if lexicon.is_name(base) and token.pos in {"PROPN", "NOUN", "ADJ"}:
            yield base
            continue
        tagged = token.pos == "PROPN" or (token.ent not in _AMOUNTS and bool(token.ent))
        if not tagged or token.pos in closed.FUNCTION_POS or token.text.lower() in closed.DATES:
            continue
        common = base in lexicon
        sure = token.text[0].isupper() and not shouting and not _opens_sentence(token, tokens)
        if sure or not common:
            yield base


def _initials(tokens: tuple[Token, ...]) -> str:
    return "".join(
        " " if token.pos in closed.FUNCTION_POS else token.text[0].lower() for token in tokens
    )


def _joined(lowers: list[str], bases: list[str]) -> dict[str, tuple[str, str]]:
    """Write neighbours as one word: "data base" as "database", "e-mail" as "email"."""
    words = [(w, b) for w, b in zip(lowers, bases, strict=True) if _LETTER.search(w)]
    found = {}
    for one, other in pairwise(words):
        for joined in (one[0] + other[0], one[0] + other[1]):  # as written, and its base form
            found[joined] = (one[1], other[1])
    return found


def _opens_sentence(token: Token, tokens: tuple[Token, ...]) -> bool:
    before = [other for other in tokens if other.start < token.start]
    return not before or before[-1].text in {".", "?", "!", ":", '"', "“", "-"}


def _negations(lowers: list[str]) -> int:
    """Count negations; those of "or not", "why or why not" and "if not, …" deny nothing."""
    return sum(
        word in closed.NEGATIONS and not _denies_nothing(lowers[:at], lowers[at + 1 :])
        for at, word in enumerate(lowers)
    )


def _denies_nothing(before: list[str], after: list[str]) -> bool:
    if before[-1:] == ["or"] or before[-2:] == ["or", "why"]:
        return True
    return before[-1:] == ["if"] and not (after and after[0][0].isalpha())


def _compares(lowers: list[str]) -> Iterator[str]:
    if "than" in lowers:
        yield "than"
    if any(word == "as" and "as" in lowers[at + 2 : at + 3] for at, word in enumerate(lowers)):
        yield "as"


def _lengths(text: str) -> set[str]:
    """Find what an answer is to be counted in, as in "explain in one sentence"."""
    return {f"{match[1].lower()}s" for match in _LENGTH.finditer(text)}


def _asked_for(tokens: tuple[Token, ...], lowers: list[str]) -> Iterator[str]:
    for at, (token, word) in enumerate(zip(tokens, lowers, strict=True)):
        if not token.tag.startswith("W") or tokens[token.head].dep in {"advcl", "relcl", "acl"}:
            continue
        following = lowers[at + 1] if at + 1 < len(lowers) else ""
        if word == "how" and following in closed.MEASURES:
            yield f"how {following}"
        elif word in closed.ASKING:
            yield closed.ASKING[word]


def _roles(tokens: tuple[Token, ...], bases: list[str]) -> Iterator[tuple[str, Role]]:
    """Say what each noun, name or pronoun does, prepositions folded into the role."""
    for token, base in zip(tokens, bases, strict=True):
        if token.pos in _NO_ROLE or token.tag.startswith("W"):
            continue
        base = closed.PRONOUNS.get(base, base)  # noqa: PLW2901  "him" is "he"
        governor = _first_of_series(token, tokens)
        head = tokens[governor.head]
        if governor.dep in {"pobj", "pcomp"}:
            beyond = tokens[head.head]
            label = "subject" if head.dep == "agent" else head.text.lower()
            yield base, Role(label=label, head=bases[head.head] if beyond is not head else "")
        elif governor.dep in _ROLES:
            yield base, Role(label=_ROLES[governor.dep], head=bases[governor.head])


def _first_of_series(token: Token, tokens: tuple[Token, ...]) -> Token:
    """Return the first of "a, b and c", whose role all of them have."""
    seen = 0
    while token.dep == "conj" and seen < len(tokens):
        token = tokens[token.head]
        seen += 1
    return token


def words_of(items: Iterable[str]) -> str:
    """Write words for people, in quotation marks."""
    return ", ".join(f'"{item}"' for item in sorted(items))
