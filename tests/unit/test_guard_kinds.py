"""What changes an answer, kind by kind: every pair here is refused, whichever is asked first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from workers.engine.config import NlpConfig
from workers.enrich.guard import Guard
from workers.enrich.nlp import SpacyAnalyser

#: Pairs by kind; the words that differ stand between braces, "{one|other}".
DIFFERENT = {
    "numbers": """
        What is {12|21} times 3?
        How do I save {500|900} euros a month?
        Who was king in {1640|1650}?
        What are the {five|seven} largest lakes?
        Is a resting pulse of {48|84} normal?
        How do I divide 81 by {3|9}?
        What can I cook in {15|45} minutes?
        Explain section {4.2|4.3} of the manual.
        Which laptop under {$600|$1,600} is quiet?
        How many teeth has a {two|six} year old child?
        What changed in version {3.11|3.12}?
        Convert {40|41} degrees to radians.
        Who won the {second|third} heat?
        What does error {404|403} mean?
        How long do {2|20} eggs take to boil?
        Tell me about World War {I|II}.
    """,
    "dates": """
        Are shops open on {Sunday|Monday}?
        What is the weather like in {March|October}?
        What happened on {4|14} July?
        When does the term end in {2023|2024}?
        Which flowers bloom in {spring|autumn}?
        Is there a train {tonight|tomorrow}?
        Remind me on {Friday|Thursday} to pay the rent.
        What sign is somebody born in {May|June}?
        Which birds sing in the {morning|evening}?
        What should I plant in {April|August}?
        Did it rain {yesterday|today}?
        What was the dollar worth in {1985|1995}?
        Book a table for {Tuesday|Wednesday}.
        Who ruled Spain in {1700|1800}?
        What is open at {midnight|noon}?
    """,
    "entities": """
        What is the population of {Norway|Portugal}?
        Who is the mayor of {Leeds|Bristol}?
        When was {Toyota|Volvo} founded?
        How deep is Lake {Baikal|Victoria}?
        What did {Newton|Darwin} write?
        How do I cancel my {Netflix|Spotify} subscription?
        Which languages are spoken in {India|Kenya}?
        How do I install {Python|Ruby} on a server?
        What is the best museum in {Vienna|Prague}?
        Who directed {Jaws|Alien}?
        Can I drive from {Munich|Berlin} to Hamburg in a day?
        How large is {Jupiter|Saturn}?
        Where did {Mozart|Chopin} die?
        Is {Sweden|Greece} in the union?
        How did {Anna Weber|Clara Weber} become famous?
        Does {Intel|Nvidia} pay well?
        How do I sort a list in {C|C#}?
    """,
    "negation": """
        Which mammals {can|cannot} swim?
        Is it legal to {record|not record} a call?
        Why {do|don't} cats like water?
        What happens if I {pay|don't pay} the fine?
        Name cities {with|without} an airport.
        Why {is|isn't} Pluto a planet?
        Which foods {contain|do not contain} gluten?
        How can I travel {with|without} a passport?
        Why {did|didn't} the empire fall?
        Who {has|has never} won a medal?
        Which metals {are|aren't} magnetic?
        The shop {is|is not} open.
        Should I {trust|never trust} my bank?
        {Somebody|Nobody} knows the answer.
        Are there countries that {have|have no} army?
        What happens if the plants are {watered|not watered}?
    """,
    "antonyms": """
        Turn the pump {on|off}.
        What should I do {before|after} a marathon?
        Why do small shops {win|lose}?
        Sort the rows in {ascending|descending} order.
        How do I {open|close} a bank account?
        How do I {increase|decrease} the volume?
        What are the {advantages|disadvantages} of solar power?
        Why are prices {rising|falling}?
        How can I {gain|lose} weight?
        How do I {encrypt|decrypt} a file?
        Is the water {hot|cold} there?
        Which is the {largest|smallest} desert?
        How do I {lock|unlock} the screen?
        What are the {best|worst} airlines?
        How do I {attach|detach} the trailer?
        Is coffee {healthy|unhealthy}?
        How do I {teach|learn} chess?
        How do I {lend|borrow} money?
        What is the {cause|effect} of inflation?
        How do I {buy|sell} shares?
        Move the window {up|down}.
        How do I {mount|unmount} a disk?
    """,
    "quantifiers, modality and tense": """
        Are {all|some} birds able to fly?
        Are {all|most} doctors rich?
        Do {only|even} members get in?
        {All|Some} swans are white.
        {Can|Should} I eat before surgery?
        {May|Must} a pilot wear a beard?
        You {can|must} enter by the back door.
        Visitors {may|should} ring the bell.
        Who {is|was} the king of Spain?
        {Is|Was} the mayor a doctor?
        Where {is|was} the treaty signed?
        {Can|Must} employers pay in cash?
        {Every|No} guest gets a key.
        Do {many|few} people live there?
        Give me {a|another} joke.
        {Most|Few} students passed.
    """,
    "comparison": """
        Which city has {more|fewer} parks?
        Who earned the {most|least} last year?
        Which phone is {bigger|smaller}?
        Is rice {cheaper|dearer} than wheat?
        Name the {tallest|shortest} giraffe.
        Which of the two is {faster|slower}?
        Which car needs {more|less} petrol?
        Is gold {heavier|lighter} than lead?
        What is the {highest|lowest} grade?
        Which river is {longer|shorter}?
        Who is {older|younger}, Tom or Ben?
        Show me the {maximum|minimum} of the column.
        Which drink has the {most|fewest} calories?
        Is the film {better|worse} than the book?
        Is a whale {larger than|as large as} a bus?
    """,
    "roles": """
        List trains from {Paris to Lyon|Lyon to Paris}.
        Translate this from {German to Dutch|Dutch to German}.
        The {dog bit the man|man bit the dog}.
        How do I convert {pounds to kilos|kilos to pounds}?
        The {teacher thanked the pupil|pupil thanked the teacher}.
        Who sold the {house to the bank|bank to the house}?
        Move the files from the {server to the laptop|laptop to the server}.
        The {cat chased the mouse|mouse chased the cat}.
        How far is it from the {station to the hotel|hotel to the station}?
        {Rome defeated Carthage|Carthage defeated Rome}.
        Is a {tiger stronger than a lion|lion stronger than a tiger}?
        How do I exchange {francs for dollars|dollars for francs}?
        The {nurse called the doctor|doctor called the nurse}.
        Pour the {milk into the flour|flour into the milk}.
        Did {Spain beat Italy|Italy beat Spain}?
        Put the {box on the table|table on the box}.
    """,
    "content": """
        How do I learn the {trumpet|cello}?
        What do {sharks|eagles} eat?
        Write a {letter|song} about rain.
        How do I repair a {bicycle|window}?
        What is the meaning of the word {harbour|meadow}?
        How do I remove {ink|wine} from a shirt?
        Why do {bees|wolves} dance?
        How do I become a {pilot|dentist}?
        What is a good name for a {horse|boat}?
        How do I grow {tomatoes|roses} indoors?
        Which {doctor|lawyer} should I see?
        How does a {telescope|fridge} work?
        What causes {asthma|migraine}?
        How do I {paint|sell} a wall?
        Is {swimming|boxing} good for the back?
        What is the {colour|price} of amber?
        Who invented the {zip|piano}?
    """,
    "language": """
        {How do I get to the station from here?|Wie komme ich von hier zu dem Bahnhof?}
        {What is the name of the river in this town?|Wie ist der Name von dem Fluss in der Stadt?}
        {Where is the library, please?|Où est la bibliothèque, s'il vous plaît, dans cette ville ?}
        {What did she say to you about the house?|¿Qué es lo que ella te dijo de la casa?}
        {Why is the sky blue?|Почему небо голубое?}
        {What is the capital of Japan?|日本の首都はどこですか}
        {What is the capital of China?|中国的首都是哪里}
        {Where can I buy bread?|من أين يمكنني شراء الخبز؟}
        {How are you?|Πώς είσαι;}
        {What time is it?|지금 몇 시예요?}
        {How much does it cost?|כמה זה עולה?}
        {Who are they and what do they want from us?|Chi sono loro e che cosa vogliono da noi?}
        {When does it start?|यह कब शुरू होता है?}
        {What is this?|นี่คืออะไร}
        {How do I do that with this and not with the other?|Hoe doe ik dat met dit en niet met het?}
    """,
    "format": """
        List the planets as {JSON|CSV}.
        Describe a sunset as a {poem|paragraph}.
        Give the results as a {table|list}.
        Answer in {XML|YAML}.
        Write the report in {Markdown|HTML}.
        Explain recursion with a {diagram|poem}.
        Write the function in {Python|Java}.
        Sum up the story in a {haiku|tweet}.
        Export the contacts as {CSV|XML}.
        Describe the algorithm in {pseudocode|Rust}.
        Tell me the news as a {limerick|table}.
        Format the invoice as {HTML|LaTeX}.
        Write an {essay|outline} about the sea.
        Reply with {bullet points|a paragraph} on tides.
        Give me the query in {SQL|bash}.
        What are the planets{? Answer as JSON.|?}
    """,
    "facts in a template": """
        Summarise ticket {AB-112|AB-113}.
        Reset the password of the user {anna|berta}.
        Delete the file {notes.txt|plans.txt}.
        Send the invoice to {jo@example.org|al@example.org}.
        What is the status of parcel {7F3K9|7F3K8}?
        Open https://example.org/{a|b}.
        What is the weather in {Lima|Quito}?
        Translate "{good morning|good night}" into French.
        Classify the review: "{It was lovely|It was dreadful}".
        What is the population of {a town called Elm|a town called Oak}?
        Is {17|18} a prime number?
        Call {0151 234|0151 243}.
        Who plays {Hamlet|Ophelia} in the film?
        What is the chemical symbol of {iron|zinc}?
        Convert {12 miles|12 yards} to metres.
        Describe the animal {otter|badger}.
        What rhymes with {moon|star}?
        Spell {necessary|separate}.
        Is {x > 3|x < 3} true?
        Compute {8 + 4|8 - 4}.
        What is {9*3|9/3}?
        How much is {$100|€100} today?
        Solve {x = 3y|x > 3y} for y.
    """,
    "length": """
        Explain photosynthesis in {one sentence|five sentences}.
        Describe Venice in {50|500} words.
        Explain tides {briefly|in detail}.
        Summarise the plot in {two|ten} lines.
        Give a {short|long} biography of Curie.
        Write a {brief|detailed} review of the film.
        Answer the question in {a word|a paragraph}.
        What is inflation{? Be concise.|?}
        Write {three|six} paragraphs about bees.
        Name {a|four} reason why ships float.
        Tell {a short|a long} story about a fox.
        Give {one example|three examples} of irony.
        Describe the war in {a sentence|a chapter}.
        Explain entropy {concisely|at length}.
        List the {top 3|top 30} songs.
        What is a black hole{? Explain in one line.|?}
    """,
}

#: What people vary without asking another thing.
SAME = """
    {How do I|How can I|What is the best way to} clean a keyboard?
    {What is|What's} the boiling point of alcohol?
    {Please explain|Explain} how vaccines work.
    {Can you tell me where|Where} the nearest pharmacy is?
    Which {app is|apps are} good for hiking?
    How do I {purchase|buy} a ticket?
    Why {do not|don't} penguins fly?
    {Why do|What makes} onions make people cry?
    How do I get rid of {an ant|ants} at home?
    Is it {hard|difficult} to keep an octopus?
    What is the best way to learn {to program|programming}?
    How {did the king become successful|could the king become a success}?
    Who fought in World War {II|2}?
    What is the best film {ever made|of all time}?
    What is your favourite dish {right now|at the moment}?
    Is coffee good for you{? Why or why not?|? Why?}
    How do I sleep better at {night|nights}?
    How do I get a {Ph.D.|PhD} in chemistry?
    What can I buy for {Rs.300|300 rs}?
    Why do {people|poeple} yawn?
"""


def pairs(lines: str) -> list[tuple[str, str]]:
    """Write out "{one|other}" as two prompts; of three ways the first is paired with each."""
    found = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        before, _, rest = line.partition("{")
        ways, _, after = rest.partition("}")
        first, *others = (before + way + after for way in ways.split("|"))
        found += [(first, other) for other in others]
    return found


@pytest.fixture(scope="module")
async def analyser() -> AsyncIterator[SpacyAnalyser]:
    """Real spaCy."""
    analyser = SpacyAnalyser(NlpConfig(budget_s=120.0))
    yield analyser
    await analyser.aclose()


async def allowed(analyser: SpacyAnalyser, asked: list[tuple[str, str]]) -> list[str]:
    """Return what a guard says of each pair it allows, in either order."""
    guard = Guard()
    found = []
    for one, other in asked:
        first, second = await asyncio.gather(analyser.analyse(one), analyser.analyse(other))
        verdicts = (guard.check(first, second), guard.check(second, first))
        found += [f"{one} = {other} (+{v.added})" for v in verdicts if v.allowed]
    return found


@pytest.mark.parametrize("kind", DIFFERENT)
async def test_a_difference_of_each_kind_is_refused(analyser: SpacyAnalyser, kind: str) -> None:
    different = pairs(DIFFERENT[kind])
    assert len(different) >= 15
    assert not await allowed(analyser, different)


async def test_another_way_to_ask_is_allowed(analyser: SpacyAnalyser) -> None:
    same = pairs(SAME)
    assert [pair for pair in same if len(await allowed(analyser, [pair])) < 2] == []
