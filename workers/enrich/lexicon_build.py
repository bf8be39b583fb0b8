"""Make `data/wordnet.tsv.gz`: ``python -m workers.enrich.lexicon_build DIR``.

WordNet 3.0 is 35 MB of text; the guard asks it only how two single words are related. The source is
the `dict` folder of any distribution of WordNet (wndb(5WN) describes the format), G. A. Miller,
"WordNet: A Lexical Database for English", Communications of the ACM 38:11, 1995.
"""

from __future__ import annotations

import gzip
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

_PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_WORD = re.compile(r"[A-Za-z][A-Za-z'.-]*\Z")

#: Senses of a word, most frequent first, that count for relations looser than a shared synset.
_SENSES = 5

#: A kind with more direct members than this is too general to stand for one of them.
_MEMBERS = 25

_OUT = Path(__file__).parent / "data" / "wordnet.tsv.gz"

_Pointer = tuple[str, str, int, int]  # symbol, target synset, word in source, word in target


class _WordNet:
    """WordNet's files, read."""

    def __init__(self, folder: Path) -> None:
        self.synsets: dict[str, tuple[list[str], list[_Pointer]]] = {}
        self.senses: dict[str, list[str]] = defaultdict(list)
        self.irregular: dict[str, dict[str, str]] = defaultdict(dict)
        for part, name in _PARTS.items():
            for fields in _lines(folder / f"data.{name}"):
                self._read_synset(part, fields)
            for fields in _lines(folder / f"index.{name}"):
                count = int(fields[2])
                self.senses[fields[0]] += [part + offset for offset in fields[-count:]]
            for fields in _lines(folder / f"{name}.exc"):
                self.irregular[fields[0]].setdefault(part, fields[1])

    def _read_synset(self, part: str, fields: list[str]) -> None:
        count = int(fields[3], 16)
        words = [fields[4 + 2 * i].split("(")[0] for i in range(count)]
        at = 4 + 2 * count
        pointers = [
            (
                fields[at + 1 + 4 * i],
                fields[at + 3 + 4 * i].replace("s", "a") + fields[at + 2 + 4 * i],
                int(fields[at + 4 + 4 * i][:2], 16),
                int(fields[at + 4 + 4 * i], 0),
            )
            for i in range(int(fields[at]))
        ]
        self.synsets[part + fields[0]] = (words, pointers)

    def words(self, synset: str) -> list[str]:
        """Return the single words of a synset, in lower case."""
        return [word.lower() for word in self.synsets[synset][0] if _WORD.match(word)]

    def may_stand_for(self, symbol: str, target: str) -> bool:
        """Whether a similar adjective, or the narrow kind that a thing or an action is one of."""
        if symbol == "@":
            members = sum(pointer[0] == "~" for pointer in self.synsets[target][1])
            return members <= _MEMBERS
        return symbol == "&"

    def is_name(self, lemma: str) -> bool:
        """Whether every sense writes the word with a capital."""
        forms = [
            word
            for synset in self.senses.get(lemma, ())
            for word in self.synsets[synset][0]
            if word.lower() == lemma
        ]
        return bool(forms) and all(form[0].isupper() for form in forms)


def main(folder: Path) -> None:
    """Read WordNet and write the table.

    Args:
        folder: WordNet's `dict` folder.
    """
    wordnet = _WordNet(folder)
    rows = []
    for word in filter(_WORD.match, sorted({*wordnet.senses, *wordnet.irregular})):
        near, opposite = _relations(wordnet, word) if word in wordnet.senses else (set(), set())
        kind = "" if word in wordnet.senses else "-"
        bases = (f"{part}={base}" for part, base in sorted(wordnet.irregular[word].items()))
        cells = (near, opposite, [base for base in bases if _WORD.match(base[2:])])
        row = [word, "N" if wordnet.is_name(word) else kind]
        rows.append("\t".join(row + [" ".join(sorted(cell)) for cell in cells]))
    _OUT.parent.mkdir(exist_ok=True)
    with gzip.GzipFile(_OUT, "wb", mtime=0) as out:
        out.write(("\n".join(rows) + "\n").encode("ascii"))
    (_OUT.parent / "LICENSE-wordnet.txt").write_text(_licence(folder))


def _relations(wordnet: _WordNet, lemma: str) -> tuple[set[str], set[str]]:
    """Return the words that may stand for `lemma`, and its opposites."""
    near: set[str] = set()
    opposite: set[str] = set()
    for rank, synset in enumerate(_by_part(wordnet.senses[lemma])):
        near.update(wordnet.words(synset))
        words, pointers = wordnet.synsets[synset]
        for symbol, target, source_word, target_word in pointers:
            own = source_word == 0 or words[source_word - 1].lower() == lemma
            if rank < _SENSES and wordnet.may_stand_for(symbol, target):
                near.update(wordnet.words(target))
            elif own and target_word and symbol in {"+", "\\", "<", "!"}:
                word = wordnet.synsets[target][0][target_word - 1].lower()
                if _WORD.match(word):
                    (opposite if symbol == "!" else near).add(word)
    near.discard(lemma)
    return near - opposite, opposite


def _by_part(synsets: Iterable[str]) -> list[str]:
    """Order senses by frequency across parts of speech: all first ones, all second ones, …."""
    seen: dict[str, int] = defaultdict(int)
    ranked = []
    for synset in synsets:
        ranked.append((seen[synset[0]], synset))
        seen[synset[0]] += 1
    return [synset for _, synset in sorted(ranked)]


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield the fields of each line but the licence's, without the gloss."""
    for line in path.read_text("ascii").splitlines():
        if line and not line.startswith(" "):
            yield line.split("|")[0].split()


def _licence(folder: Path) -> str:
    lines = (folder / "data.noun").read_text("ascii").splitlines()
    text = [re.sub(r"^  \d+ ", "", line).rstrip() for line in lines if line.startswith(" ")]
    return "data/wordnet.tsv.gz is derived from WordNet 3.0.\n\n" + "\n".join(text) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
