"""The spaCy pipeline inside its child process: from text to the JSON of an `Analysis`."""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

from workers.enrich.clauses import clauses
from workers.enrich.connectives import connectives
from workers.enrich.language import LanguageGuess

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class SpacyModel:
    """A spaCy pipeline.

    Args:
        model: Package of the pipeline, one that spaCy knows or one with a `load` function.
        max_chars: Longer texts are analysed up to here.
    """

    def __init__(self, model: str, max_chars: int) -> None:
        self._nlp = _load(model)
        self._max_chars = max_chars
        self._language = LanguageGuess(default=self._nlp.lang)
        list(self._nlp.pipe(["Is it warm?"]))

    def __call__(self, texts: Sequence[str]) -> Iterator[bytes]:
        """Analyse texts, in order.

        Yields:
            For each text JSON that `SpacyAnalyser` reads: an `Analysis` whose tokens and entities
            are rows.
        """
        # Half a surrogate pair stops the tokenizer; one "?" for it keeps all places as they are.
        cut = [text[: self._max_chars].encode("utf-8", "replace").decode("utf-8") for text in texts]
        for text, doc in zip(texts, self._nlp.pipe(cut, batch_size=8), strict=True):
            analysis = self._describe(doc)
            analysis["truncated"] = len(text) > self._max_chars
            yield json.dumps(analysis).encode("ascii")

    def _describe(self, doc: Any) -> dict[str, Any]:
        words = [token for token in doc if not token.is_space]
        place = {token.i: number for number, token in enumerate(words)}
        return {
            "language": self._language.of(doc.text, [token.lower_ for token in words]),
            "sentences": [s for s in (sent.text.strip() for sent in doc.sents) if s],
            "entities": [[e.text, e.label_, e.start_char, e.end_char] for e in doc.ents],
            "noun_phrases": [chunk.text for chunk in doc.noun_chunks],
            "connectives": connectives(doc),
            "clauses": clauses(doc),
            "tokens": [
                [
                    token.text,
                    token.lemma_,
                    token.pos_,
                    token.tag_,
                    token.dep_,
                    # A head that is white space was left out: such a token stands for itself.
                    place.get(token.head.i, place[token.i]),
                    token.ent_type_,
                    token.idx,
                ]
                for token in words
            ],
        }


def _load(model: str) -> Any:
    """Load a pipeline by spaCy's own look-up, or by the `load` of its package."""
    if not model.endswith("_trf"):
        # spaCy loads these if it finds them: seconds and half a gigabyte that go unused.
        for unused in ("torch", "tensorflow", "mxnet", "cupy"):
            not_importable: Any = None
            sys.modules.setdefault(unused, not_importable)
    import spacy

    try:
        return spacy.load(model)
    except OSError:
        # A pipeline package under another name than the one it was made with.
        try:
            package = importlib.import_module(model)
        except ImportError as exc:
            msg = f"no spaCy pipeline {model!r} is installed"
            raise ValueError(msg) from exc
        return package.load()
