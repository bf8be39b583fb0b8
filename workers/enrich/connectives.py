"""Words that join clauses and sentences, found by what the parser says of them.

The adverbs are those that the Penn Discourse Treebank 2.0 (Prasad et al., LREC 2008) lists as
explicit connectives; coordinating and subordinating ones are known by their relation.
"""

from __future__ import annotations

from typing import Any

# fmt: off
_ADVERBS = frozenset({
    "accordingly", "additionally", "afterward", "afterwards", "also", "alternatively",
    "besides", "consequently", "conversely", "earlier", "finally", "further", "furthermore",
    "hence", "however", "indeed", "instead", "later", "likewise", "meanwhile", "moreover",
    "nevertheless", "next", "nonetheless", "otherwise", "overall", "previously", "rather",
    "regardless", "separately", "similarly", "simultaneously", "specifically", "still",
    "subsequently", "then", "thereafter", "thereby", "therefore", "though", "thus",
    "ultimately", "yet",
})
# fmt: on

#: Several words that make one connective.
_PHRASES = (
    "as a result",
    "as long as",
    "as soon as",
    "as well as",
    "because of",
    "even if",
    "even though",
    "for example",
    "for instance",
    "in addition",
    "in case",
    "in contrast",
    "in order to",
    "in other words",
    "on the contrary",
    "on the other hand",
    "provided that",
    "rather than",
    "so that",
    "such as",
    "that is",
)


def connectives(doc: Any) -> list[str]:
    """Return the connectives of a parsed text.

    Args:
        doc: A spaCy document with tags and relations.

    Returns:
        In lower case, in order, each as often as it stands in the text.
    """
    found: list[tuple[int, str]] = []
    taken: set[int] = set()
    words = [token.lower_ for token in doc]
    for phrase in (_phrase.split() for _phrase in _PHRASES):
        for start in range(len(words) - len(phrase) + 1):
            if words[start] == phrase[0] and words[start : start + len(phrase)] == phrase:
                found.append((start, " ".join(phrase)))
                taken.update(range(start, start + len(phrase)))
    found.extend(
        (token.i, token.lower_) for token in doc if token.i not in taken and _connects(token)
    )
    return [text for _, text in sorted(found)]


def _connects(token: Any) -> bool:
    if token.dep_ == "cc":
        return True
    if token.dep_ == "mark":
        return token.tag_ != "TO"
    if token.dep_ == "advmod" and token.tag_ == "WRB":
        # "when" and "where" join a clause that hangs on another one, and ask in a main clause.
        return token.head.dep_ in {"advcl", "ccomp", "relcl"}
    return token.dep_ in {"advmod", "prep"} and token.lower_ in _ADVERBS
