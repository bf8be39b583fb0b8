"""What the guard lets through, and by which rule it refuses; analyses come from real spaCy."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from workers.engine.config import NlpConfig
from workers.engine.protocols import Analysis, Verdict
from workers.enrich.guard import Guard
from workers.enrich.lexicon import Lexicon
from workers.enrich.nlp import SpacyAnalyser
from workers.enrich.rules import RULES

SAME = [
    ("How do I bake sourdough bread?", "How can I bake sourdough bread?"),
    ("What is the best way to peel garlic?", "How do you peel garlic?"),
    ("What is the quickest route to the harbour?", "What is the fastest route to the harbour?"),
    ("Why do leaves change colour?", "What makes leaves change their colour?"),
    ("Where can I buy a used bicycle?", "Where can one buy used bicycles?"),
    ("What does a glacier look like?", "What do glaciers look like?"),
    ("How does a catalytic converter work?", "How do catalytic converters work?"),
    ("What causes earthquakes in Japan?", "What are the causes of earthquakes in Japan?"),
    ("Is it hard to learn Icelandic?", "Is Icelandic difficult to learn?"),
    ("Which app is best for birdsong?", "Which apps are best for birdsong?"),
    ("Where do stonemasons train?", "Where do stone-masons train?"),
    (
        'What is the meaning of the expression "to get cold feet"?',
        'What does the expression "to get cold feet" mean?',
    ),
    ("Who wrote Middlemarch?", "Who was it that wrote Middlemarch?"),
    ("Which is cheaper, tin or zinc?", "Which is cheaper, zinc or tin?"),
    ("How many moons does Saturn have?", "Saturn has how many moons?"),
    ("What did Marie Curie discover?", "What did Curie discover?"),
    ("How is a database index built?", "How is a data base index built?"),
    ("What is a large language model (LLM)?", "What is a large language model?"),
    ("Summarize the report.", "Please summarize the report."),
    ("The wolf chased the deer.", "The deer was chased by the wolf."),
    ("How can we prevent flooding?", "How can flooding be avoided?"),
    ("Isn't it impossible to square the circle?", "Is it not impossible to square the circle?"),
]

DIFFERENT = [
    # Numbers and dates
    ("numbers", "What is 17 times 4?", "What is 18 times 4?"),
    ("numbers", "Who won the cup in 1998?", "Who won the cup in 2002?"),
    ("numbers", "Name three rivers in Peru.", "Name four rivers in Peru."),
    ("numbers", "Summarise order 4711.", "Summarise order 4712."),
    ("numbers", "Is the museum open on Monday?", "Is the museum open on Tuesday?"),
    ("numbers", "What is 2,500 in words?", "What is 250 in words?"),
    # Names
    ("entities", "What is the capital of Chile?", "What is the capital of Kenya?"),
    ("entities", "Who founded Siemens?", "Who founded Bosch?"),
    ("entities", "How do I travel from Lyon to Nice?", "How do I travel from Lyon to Marseille?"),
    ("entities", "Who is Jon Marin?", "Who is Jon Martin?"),
    ("entities", "Why is the sky blue?", "Why is the sky over Iceland blue?"),
    # Negation
    ("negation", "Which birds can fly?", "Which birds cannot fly?"),
    ("negation", "Can plants grow with soil?", "Can plants grow without soil?"),
    ("negation", "Why did he never call?", "Why did he call?"),
    # Opposites
    ("antonyms", "Turn the heating on.", "Turn the heating off."),
    ("antonyms", "Enable the firewall.", "Disable the firewall."),
    ("antonyms", "How do I install the driver?", "How do I uninstall the driver?"),
    ("antonyms", "Sort the names in ascending order.", "Sort the names in descending order."),
    ("antonyms", "What should I eat before a run?", "What should I eat after a run?"),
    ("antonyms", "Why do teams win?", "Why do teams lose?"),
    ("antonyms", "Is the north side warm?", "Is the south side warm?"),
    ("antonyms", "What are the best films of all time?", "What are the worst films of all time?"),
    # Direction of a comparison
    ("comparison", "Which car uses more fuel?", "Which car uses less fuel?"),
    ("comparison", "Who has the most votes?", "Who has the fewest votes?"),
    # What is asked for
    ("question", "When was the bridge built?", "Who built the bridge?"),
    ("question", "Where do swallows go?", "Why do swallows go?"),
    ("question", "How many people live there?", "Why do people live there?"),
    # Form and length
    ("answer_form", "Give me the list as JSON.", "Give me the list as XML."),
    ("answer_form", "Explain gravity in detail with a diagram.", "Explain gravity in detail."),
    # All, some, only
    ("quantifiers", "Some swans are white.", "All swans are white."),
    ("quantifiers", "Only members may vote.", "Members may vote."),
    ("tense", "Who is the king of Spain?", "Who was the king of Spain?"),
    ("modality", "Can I eat before surgery?", "Should I eat before surgery?"),
    ("quantifiers", "Are all doctors rich?", "Are most doctors rich?"),
    # What may be and what has to be
    ("modality", "You can enter by the back door.", "You must enter by the back door."),
    # Substituted content
    ("content", "How do I learn the violin?", "How do I learn the flute?"),
    ("content", "Translate the word cheese.", "Translate the word bread."),
    ("content", "The cook cut the onion.", "The cook cut the carpet."),
    ("content", "Write a function that adds entries.", "Write a class that adds entries."),
    # Roles
    ("roles", "The goalkeeper pushed the striker.", "The striker pushed the goalkeeper."),
    ("roles", "List flights from Oslo to Rome.", "List flights from Rome to Oslo."),
    ("roles", "How do I convert miles to yards?", "How do I convert yards to miles?"),
    ("roles", "A lion is stronger than a hyena.", "A hyena is stronger than a lion."),
    ("roles", "She poured the tea into the milk.", "She poured the milk into the tea."),
    ("roles", "The pie is made of dough.", "The dough is made of pie."),
    # Language
    (
        "language",
        "What does the word for house mean in this old song?",
        "Was bedeutet das Wort, das in diesem alten Lied für ein Haus steht?",
    ),
]


@pytest.fixture(scope="module")
async def analyser() -> AsyncIterator[SpacyAnalyser]:
    """Real spaCy."""
    analyser = SpacyAnalyser(NlpConfig(budget_s=120.0))
    yield analyser
    await analyser.aclose()


@pytest.fixture(scope="module")
def guard() -> Guard:
    """A guard over the packaged lexicon."""
    return Guard()


async def verdict(guard: Guard, analyser: SpacyAnalyser, asked: str, stored: str) -> Verdict:
    return guard.check(await analyser.analyse(asked), await analyser.analyse(stored))


@pytest.mark.parametrize(("asked", "stored"), SAME)
async def test_the_same_question_is_allowed(
    guard: Guard, analyser: SpacyAnalyser, asked: str, stored: str
) -> None:
    for one, other in ((asked, stored), (stored, asked)):
        found = await verdict(guard, analyser, one, other)
        assert found.allowed, found


@pytest.mark.parametrize(("rule", "asked", "stored"), DIFFERENT)
async def test_a_difference_that_changes_the_answer_is_refused(
    guard: Guard, analyser: SpacyAnalyser, rule: str, asked: str, stored: str
) -> None:
    for one, other in ((asked, stored), (stored, asked)):
        found = await verdict(guard, analyser, one, other)
        assert not found.allowed
        assert found.rule == rule, found.detail
        assert found.detail


async def test_every_rule_has_an_example() -> None:
    assert {rule for rule, _, _ in DIFFERENT} == RULES.keys() - {"incomparable"}


async def test_an_added_word_is_counted_between_questions_and_refused_elsewhere(
    guard: Guard, analyser: SpacyAnalyser
) -> None:
    asked = await verdict(
        guard, analyser, "How do I cook lentils quickly?", "How do I cook lentils?"
    )
    assert asked == Verdict(allowed=True, added=1)
    stated = await verdict(guard, analyser, "Cook the red lentils.", "Cook the lentils.")
    assert stated.rule == "content"


async def test_a_prompt_is_the_same_as_itself(guard: Guard, analyser: SpacyAnalyser) -> None:
    for text in ("How tall is K2?", "", "?!", "日本の首都はどこですか", "a" * 30_000):
        assert (await verdict(guard, analyser, text, text)).allowed


async def test_what_was_not_read_to_its_end_is_refused(
    guard: Guard, analyser: SpacyAnalyser
) -> None:
    long = "The cat sat on the mat. " * 1_000
    assert (await verdict(guard, analyser, long, long + "Why?")).rule == "incomparable"


async def test_another_pipeline_is_refused(guard: Guard) -> None:
    one = Analysis(text="a b", pipeline="one")
    assert guard.check(one, Analysis(text="a b c", pipeline="two")).rule == "incomparable"


async def test_a_text_without_words_is_refused(guard: Guard, analyser: SpacyAnalyser) -> None:
    assert (await verdict(guard, analyser, "", "Why?")).rule == "incomparable"


async def test_long_prompts_take_bounded_time(guard: Guard, analyser: SpacyAnalyser) -> None:
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}x{'y' * (i % 7)}" for i in range(1_500)]
    one, other = " ".join(words), " ".join(reversed(words))
    first, second = await analyser.analyse(one), await analyser.analyse(other)
    started = time.perf_counter()
    guard.check(first, second)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("word", "pos", "graded", "base"),
    [
        ("Bridges", "NOUN", False, "bridge"),
        ("thing", "NOUN", False, "thing"),
        ("running", "VERB", False, "run"),
        ("best", "ADJ", True, "good"),
        ("wider", "ADJ", True, "wide"),
        ("taller", "ADJ", True, "tall"),
        ("children", "NOUN", False, "child"),
        ("found", "VERB", False, "find"),
        ("glass", "NOUN", False, "glass"),
        ("zorblings", "NOUN", False, "zorblings"),
    ],
)
def test_base_forms(word: str, pos: str, graded: bool, base: str) -> None:
    assert Lexicon.load().base(word, pos, graded) == base


@pytest.mark.parametrize(
    ("one", "other", "near", "opposite"),
    [
        ("quick", "fast", True, False),
        ("prevent", "avoid", True, False),
        ("goverment", "government", True, False),
        ("hot", "cold", False, True),
        ("install", "uninstall", False, True),
        ("possible", "impossible", False, True),
        ("violin", "flute", False, False),
        ("steel", "steal", False, False),
    ],
)
def test_relations(one: str, other: str, near: bool, opposite: bool) -> None:
    lexicon = Lexicon.load()
    assert lexicon.near(one, other) is near
    assert lexicon.opposite(one, other) is opposite
    assert lexicon.opposite(other, one) is opposite


@pytest.mark.parametrize(
    ("one", "other", "akin"),
    [
        ("success", "successful", True),
        ("program", "programming", True),
        ("trainee", "training", False),
        ("employer", "employee", False),
        ("capital", "capitalism", False),
        ("organ", "organism", False),
        ("engine", "engineering", False),
        ("policy", "police", False),
        ("universe", "university", False),
        ("moral", "immoral", False),
    ],
)
def test_families_of_words(one: str, other: str, akin: bool) -> None:
    lexicon = Lexicon.load()
    assert lexicon.akin(one, other) is lexicon.akin(other, one) is akin
