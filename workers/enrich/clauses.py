"""The parts of a compound question, each as a question that stands on its own."""

from __future__ import annotations

from typing import Any

_SUBJECTS = frozenset({"nsubj", "nsubjpass", "csubj", "expl"})
_CLAUSE_HEADS = frozenset({"VERB", "AUX"})

#: Tags of verbs that carry tense.
_FINITE = frozenset({"VBD", "VBP", "VBZ", "MD"})

#: A part of fewer words says too little to be looked up.
_MIN_WORDS = 3


def clauses(doc: Any) -> list[str]:
    """Split a compound question.

    Sentences are split off each other, and a sentence where a coordinated verb has a subject or a
    question word of its own ("What is X and how does Y work?").

    Args:
        doc: A spaCy document with tags and relations.

    Returns:
        The parts in order, or nothing when the text asks one thing.
    """
    if "?" not in doc.text:
        return []
    parts: list[str] = []
    for sentence in doc.sents:
        if sentence.text.rstrip().endswith("?"):
            parts.extend(_split(sentence))
    return parts if len(parts) > 1 else []


def _split(sentence: Any) -> list[str]:
    """Cut a question before each clause that could be one of its own."""
    starts = [sentence.start]
    for token in sentence:
        if token.dep_ == "conj" and token.pos_ in _CLAUSE_HEADS and _stands_alone(token):
            starts.append(max(token.left_edge.i, starts[-1]))
        elif token.dep_ == "cc" and _asks(sentence, token.i + 1):
            starts.append(token.i + 1)
    starts = sorted(set(starts))
    spans = []
    for start, end in zip(starts, [*starts[1:], sentence.end], strict=True):
        words = [token for token in sentence.doc[start:end] if not token.is_space]
        while words and (words[-1].dep_ == "cc" or words[-1].is_punct):
            words.pop()
        while words and (words[0].dep_ == "cc" or words[0].is_punct):
            words.pop(0)
        spans.append(words)
    if any(len(words) < _MIN_WORDS for words in spans):
        return [_question(spans[0] if len(spans) == 1 else list(sentence))]
    return [_question(words) for words in spans]


def _stands_alone(verb: Any) -> bool:
    """Whether a coordinated verb has what a question needs: a subject, asked about or named."""
    children = list(verb.children)
    if not any(child.dep_ in _SUBJECTS for child in children):
        return False
    # A clause that hangs on another one's verb is not a second question.
    head = verb.head
    while head.dep_ == "conj":
        head = head.head
    return head.dep_ == "ROOT"


def _asks(sentence: Any, start: int) -> bool:
    """Whether words read like the start of a question, however they were parsed.

    A small parser often takes the second question for a list of nouns. A question word with its
    verb close behind is a safer sign.
    """
    words = sentence.doc[start : min(start + 4, sentence.end)]
    if len(words) < _MIN_WORDS or not words[0].tag_.startswith("W"):
        return False
    return any(word.tag_ in _FINITE for word in words[1:])


def _question(words: list[Any]) -> str:
    """Write tokens as a question."""
    kept = [token for token in words if not token.is_space]
    while kept and kept[-1].is_punct:
        kept.pop()
    if not kept:
        return ""
    text = kept[0].doc[kept[0].i : kept[-1].i + 1].text.strip()
    return f"{text[:1].upper()}{text[1:]}?"
