"""The guard's rules, in the order in which they are asked.

Each takes the asked and the stored prompt's reading and returns what differs, for people, or None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from workers.enrich import closed_class as closed
from workers.enrich.lexicon import Lexicon
from workers.enrich.reading import Reading, Role, words_of

Rule = Callable[[Reading, Reading, Lexicon], str | None]

#: Above this many content words a pair is compared by equality alone: the rest grows by the square.
_MANY_WORDS = 200


def incomparable(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse what was not read to its end: what was not seen may differ."""
    if asked.truncated or stored.truncated:
        return "only the first part of a long prompt was analysed"
    if not (asked.words and stored.words):
        return "there are no words to compare"
    return None


def language(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse prompts in different languages."""
    return _differ("language", asked.language, stored.language)


def numbers(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse different numbers, dates, sums and currencies."""
    if asked.numbers.keys() != stored.numbers.keys():
        return _one_sided("number", asked.numbers, stored.numbers)
    if asked.dates != stored.dates:
        return _one_sided("date", asked.dates, stored.dates)
    if asked.signs != stored.signs:
        return _differ("sum", " ".join(asked.signs), " ".join(stored.signs))
    if asked.currencies and stored.currencies and asked.currencies != stored.currencies:
        return _one_sided("currency", asked.currencies, stored.currencies)
    return None


def entities(asked: Reading, stored: Reading, lexicon: Lexicon) -> str | None:
    """Refuse a name that the other prompt does not have in any spelling.

    An acronym counts as had when the words it stands for are there, and a person's given name may
    be left out.
    """
    only_asked = _missing_names(asked, stored, lexicon)
    only_stored = _missing_names(stored, asked, lexicon)
    if not (only_asked and only_stored):
        only_asked -= asked.given_names
        only_stored -= stored.given_names
    if only_asked or only_stored:
        return _one_sided("name", only_asked, only_stored)
    return None


def negation(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse when one denies what the other does not; two denials cancel out."""
    if asked.negations % 2 != stored.negations % 2:
        return "one is negated"
    return None


def comparison(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse when the two compare in different directions, or only one statement compares."""
    pair = _opposed_grammar(asked, stored, closed.COMPARATIVE)
    if pair is not None:
        return f'"{pair[0]}" against "{pair[1]}"'
    if asked.compares == stored.compares:
        return None
    if asked.compares and stored.compares:
        return _one_sided("comparison", asked.compares, stored.compares)
    if not (asked.question and stored.question):
        return "only one compares"
    return None


def antonyms(asked: Reading, stored: Reading, lexicon: Lexicon) -> str | None:
    """Refuse when each has a word whose opposite the other has."""
    pair = _opposed_grammar(asked, stored, closed.OPPOSED)
    if pair is not None:
        return f'"{pair[0]}" against "{pair[1]}"'
    only_asked, only_stored = _only(asked, stored)
    for one in only_asked:
        for other in only_stored:
            if lexicon.opposite(one, other):
                return f'"{one}" against "{other}"'
    return None


def question(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse when one asks for a person, say, and the other for a time."""
    if asked.asked_for and stored.asked_for and not asked.asked_for & stored.asked_for:
        return f"{words_of(asked.asked_for)} against {words_of(stored.asked_for)}"
    return None


def tense(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse when one asks who, where or whether it is and the other who, where or whether it was.

    "What was the best film ever?" asks what "What is …" asks.
    """
    if not (asked.asked_for or (asked.polar and stored.polar)):
        return None
    if asked.tense and stored.tense and asked.tense != stored.tense:
        return f"{asked.tense} against {stored.tense}"
    return None


def answer_form(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse when the answers are to look different or to be of different length."""
    if asked.formats != stored.formats:
        return _one_sided("form", asked.formats, stored.formats)
    return None


def quantifiers(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse what is claimed, or asked to be true, of all and of some, few or only these."""
    if not _claims(asked, stored):
        return None  # "some of the best" and "all the best" ask for the same list
    differ = asked.quantifiers ^ stored.quantifiers
    if asked.polar and stored.polar and not (asked.quantifiers and stored.quantifiers):
        differ &= {"only"}  # "in some ways" narrows a question no more than other words do
    if differ:
        return _one_sided("quantifier", asked.quantifiers, stored.quantifiers)
    return None


def modality(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse when one says, or asks, what can be and the other what has to be."""
    if not _claims(asked, stored):
        return None  # "How should I …" and "How can I …" ask for the same advice
    if asked.modality != stored.modality and asked.modality and stored.modality:
        return f"{words_of(asked.modality)} against {words_of(stored.modality)}"
    return None


def content(asked: Reading, stored: Reading, lexicon: Lexicon) -> str | None:
    """Refuse a content word that has no counterpart where the other says something else.

    Between questions an added word only narrows or frames ("… these days?"); in statements and
    orders every content word counts.
    """
    only_asked, only_stored = unmatched(asked, stored, lexicon)
    if only_asked and only_stored:
        return f"{words_of(only_asked)} against {words_of(only_stored)}"
    if (only_asked or only_stored) and not (asked.question and stored.question):
        return _one_sided("word", only_asked, only_stored)
    return None


def roles(asked: Reading, stored: Reading, _lexicon: Lexicon) -> str | None:
    """Refuse when two things have changed places: who does it to whom, from where to where."""
    pair = _swapped(asked, stored)
    if pair is not None:
        return f'"{pair[0]}" and "{pair[1]}" have changed places'
    if (asked.question and stored.question) or asked.passive != stored.passive:
        return None  # questions, and the passive voice, turn words round and mean the same
    if asked.order != stored.order and Counter(asked.order) == Counter(stored.order):
        return "the same words in another order"
    return None


#: Rules by the name under which a refusal is recorded.
RULES: dict[str, Rule] = {
    "incomparable": incomparable,
    "language": language,
    "numbers": numbers,
    "negation": negation,
    "comparison": comparison,
    "antonyms": antonyms,
    "answer_form": answer_form,
    "entities": entities,
    "question": question,
    "tense": tense,
    "quantifiers": quantifiers,
    "modality": modality,
    "content": content,
    "roles": roles,
}


def unmatched(asked: Reading, stored: Reading, lexicon: Lexicon) -> tuple[list[str], list[str]]:
    """Pair off the content words of two prompts.

    Returns:
        The words left over on either side.
    """
    only_asked = [word for word in asked.content if word not in stored.words]
    only_stored = [word for word in stored.content if word not in asked.words]
    if max(len(only_asked), len(only_stored)) > _MANY_WORDS:
        return only_asked, only_stored
    for word in list(only_asked):
        partner = next(
            (w for w in only_stored if lexicon.near(word, w) or lexicon.akin(word, w)), None
        )
        if partner is not None:
            only_asked.remove(word)
            only_stored.remove(partner)
    _drop_joined(only_asked, only_stored, stored)
    _drop_joined(only_stored, only_asked, asked)
    if only_asked and only_stored:
        only_asked = [w for w in only_asked if not any(lexicon.near(w, x) for x in stored.light)]
        only_stored = [w for w in only_stored if not any(lexicon.near(w, x) for x in asked.light)]
    return only_asked, only_stored


def _drop_joined(words: list[str], parts: list[str], other: Reading) -> None:
    """Take away words that the other prompt writes as two, and those two."""
    for word in [word for word in words if word in other.joined]:
        words.remove(word)
        for part in other.joined[word]:
            if part in parts:
                parts.remove(part)


def _missing_names(one: Reading, other: Reading, lexicon: Lexicon) -> set[str]:
    return {
        name
        for name in one.names - other.words
        if len(name) == 1
        or (name not in other.initials.split() and name not in one.initials.split())
        if not any(lexicon.related(name, word) for word in other.words)
        if not (name in one.uncapped and any(lexicon.near(name, word) for word in other.words))
    }


def _only(asked: Reading, stored: Reading) -> tuple[list[str], list[str]]:
    """Return the words, light ones included, that only one side has."""
    one = [word for word in {*asked.content, *asked.light} if word not in stored.words]
    other = [word for word in {*stored.content, *stored.light} if word not in asked.words]
    if max(len(one), len(other)) > _MANY_WORDS:
        return [], []
    return one, other


def _opposed_grammar(
    asked: Reading, stored: Reading, among: frozenset[str]
) -> tuple[str, str] | None:
    """Return a closed-class word that only one side has, and its opposite on the other."""
    for mine in asked.grammar - stored.grammar:
        for theirs in stored.grammar - asked.grammar:
            if mine in among and frozenset((mine, theirs)) in closed.OPPOSITES:
                return mine, theirs
    return None


def _swapped(asked: Reading, stored: Reading) -> tuple[str, str] | None:
    """Return two words that have each other's role in the other prompt."""
    here, there = _by_word(asked.roles), _by_word(stored.roles)
    shared = [word for word in here if word in there][:_MANY_WORDS]
    for at, one in enumerate(shared):
        for other in shared[at + 1 :]:
            if _exchanged(here, there, one, other):
                return one, other
    return None


def _exchanged(
    here: dict[str, set[Role]], there: dict[str, set[Role]], one: str, other: str
) -> bool:
    """Whether what `one` does here `other` does there, and the other way round.

    Either the labels alone change places (subject and object), or the labels are the same and
    the heads change ("started at 9 and finished at 10").
    """
    labels = [
        ({role.label for role in side[one]}, {role.label for role in side[other]})
        for side in (here, there)
    ]
    (one_here, other_here), (one_there, other_there) = labels
    if one_here == other_there and other_here == one_there and one_here != other_here:
        return True
    return here[one] == there[other] and here[other] == there[one] and here[one] != here[other]


def _by_word(pairs: Iterable[tuple[str, Role]]) -> dict[str, set[Role]]:
    found: dict[str, set[Role]] = {}
    for word, role in pairs:
        found.setdefault(word, set()).add(role)
    return found


def _claims(asked: Reading, stored: Reading) -> bool:
    """Whether each word counts: not where both ask "what", "how" and the like."""
    if asked.polar and stored.polar:
        return True
    return not (asked.question and stored.question)


def _differ(what: str, asked: str, stored: str) -> str | None:
    return None if asked == stored else f'{what} "{asked}" against "{stored}"'


def _one_sided(what: str, asked: Iterable[str], stored: Iterable[str]) -> str:
    """Say what only one side has."""
    only = set(asked) ^ set(stored)
    return f"only one has the {what} {words_of(only)}"
