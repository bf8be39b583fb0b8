"""Words of English that a grammar could list: those that build sentences rather than say things.

Content words are not listed here; how they relate is the lexicon's business. An exception are the
general words that people frame any question with ("What is the best way to …"): they are light.
"""

from __future__ import annotations


def _list(text: str) -> list[str]:
    return text.split()


def _words(text: str) -> frozenset[str]:
    return frozenset(_list(text))


FUNCTION_POS = _words("DET ADP PRON CCONJ SCONJ PART PUNCT SPACE SYM INTJ AUX NUM")

#: Words that carry no content wherever they stand.
EMPTY = _words("be have do will would shall please then there here as so very really quite")

#: Forms of auxiliary verbs that are words of another kind too.
AUXILIARIES = {
    **dict.fromkeys(("does", "did", "doing"), "do"),
    **dict.fromkeys(("'s", "\u2019s", "being"), "be"),
    "has": "have",
}

#: Words that people frame any question with; in statements and orders they count.
LIGHT = EMPTY | _words(
    "get make take give go come use happen find know tell explain describe think say mean seem "
    "become keep put let need want like can could should may might must "
    "way thing person people someone anyone somebody anybody everyone everybody something "
    "anything one kind type sort example reason idea "
    "good great nice top main major important various different several certain particular "
    "specific suitable available effective okay suggest recommend try help start "
    "well actually exactly possible possibly much many most more also just even "
    "ever still too some any other such now currently"
)

_PHRASES = (
    "right now",
    "at the moment",
    "at present",
    "these days",
    "so far",
    "till now",
    "until now",
    "of all time",
    "in the world",
    "in your opinion",
    "in your view",
    "according to you",
    "in general",
    "for example",
    "do you agree",
)

#: Phrases that frame any question as well, by their first word.
FRAMES = {
    phrase.split()[0]: tuple(
        tuple(other.split()) for other in _PHRASES if other.split()[0] == phrase.split()[0]
    )
    for phrase in _PHRASES
}

NEGATIONS = _words(
    "not n't nt no never without none nobody nothing neither nor cannot hardly barely nowhere"
)

#: Number words and their values. "one" is left out: it is a pronoun too.
NUMBERS = {
    **{
        word: str(value)
        for value, word in enumerate(
            _list(
                "two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                "fifteen sixteen seventeen eighteen nineteen twenty"
            ),
            start=2,
        )
    },
    **{
        word: str(10 * value)
        for value, word in enumerate(
            _list("thirty forty fifty sixty seventy eighty ninety"), start=3
        )
    },
    "zero": "0",
    "half": "0.5",
    "dozen": "12",
    "hundred": "100",
    "thousand": "1000",
    "million": "1000000",
    "billion": "1000000000",
    "first": "1st",
    "second": "2nd",
    "third": "3rd",
    "fourth": "4th",
    "fifth": "5th",
    "twice": "2x",
    "double": "2x",
    "triple": "3x",
}

DATES = _words(
    "january february march april june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday "
    "today tomorrow yesterday tonight spring summer autumn winter "
    "morning afternoon evening night midnight noon"
)

#: Question words that ask for one kind of thing. "what", "which" and "how" ask for anything.
ASKING = {
    "who": "who",
    "whom": "who",
    "whose": "who",
    "when": "when",
    "where": "where",
    "why": "why",
}

#: What "how" can measure.
MEASURES = _words("many much long far old often tall big fast high deep heavy wide soon")

#: Modal verbs by what they say: that something may be, or has to be.
MODALITY = {
    **dict.fromkeys(("can", "could", "may", "might"), "can"),
    **dict.fromkeys(("must", "should", "ought"), "must"),
}

#: Quantifiers by what they claim.
QUANTIFIERS = {
    **dict.fromkeys(("all", "every", "each", "always", "everyone", "everybody", "both"), "all"),
    **dict.fromkeys(("some", "several", "sometimes", "certain"), "some"),
    **dict.fromkeys(("many", "most", "often", "usually", "mostly"), "many"),
    **dict.fromkeys(("few", "rarely", "seldom", "little"), "few"),
    "another": "another",
    **dict.fromkeys(("only", "solely", "exclusively"), "only"),
}

#: Closed-class words and their opposites.
OPPOSITES = {
    frozenset(pair.split("/"))
    for pair in _list(
        "on/off in/out into/out up/down before/after with/without over/under above/below "
        "inside/outside onto/off from/into since/until for/against "
        "more/less more/fewer most/least most/fewest much/little many/few first/last "
        "left/right left/go always/never minimum/maximum min/max earlier/later sooner/later "
        "upward/downward forward/backward forwards/backwards asc/desc ascending/descending "
        "true/false yes/no he/she him/her his/her enable/disable encrypt/decrypt "
        "encode/decode create/delete add/remove create/destroy send/receive before/during "
        "after/during before/while after/while"
    )
}

#: Closed-class words that have an opposite.
OPPOSED = frozenset(word for pair in OPPOSITES for word in pair)

#: Those of them that say which way a comparison goes.
COMPARATIVE = _words("more less most least fewer fewest minimum maximum min max")

#: What an answer may be asked to look like, and how long to be.
FORMATS = _words(
    "json xml yaml csv html markdown latex table bullet bulleted essay poem haiku limerick rhyme "
    "paragraph tweet summary summarize summarise outline brief briefly concise "
    "concisely detailed pseudocode regex diagram syllable python javascript java "
    "sql c++ bash rust"
)

#: The forms of a pronoun as one.
PRONOUNS = {
    "me": "i",
    "my": "i",
    "him": "he",
    "his": "he",
    "her": "she",
    "us": "we",
    "our": "we",
    "them": "they",
    "their": "they",
    "your": "you",
    "its": "it",
}
