"""Each reader of a transcript gets own outputs, cut in its own way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.serving import clamp_prompt_logprobs
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from tests.unit.engine_parts import output, piece
from workers.engine.replay import NotStorableError, pack, replay
from workers.engine.transcript import Cursor, Transcript

DELTA, CUMULATIVE, FINAL_ONLY = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)


def whole(
    outputs: list[RequestOutput], kind: RequestOutputKind
) -> dict[int, tuple[str, list[int]]]:
    texts: dict[int, tuple[str, list[int]]] = {}
    for one in outputs:
        for part in one.outputs:
            text, ids = texts.get(part.index, ("", []))
            texts[part.index] = (
                (text + part.text, [*ids, *part.token_ids])
                if kind == DELTA
                else (part.text, list(part.token_ids))
            )
    return texts


@given(
    script=st.lists(
        st.tuples(st.integers(0, 2), st.text("ab", min_size=1, max_size=3), st.booleans()),
        min_size=1,
        max_size=20,
    ),
    kind=st.sampled_from(list(RequestOutputKind)),
)
@settings(deadline=None)
def test_whenever_it_is_read_the_whole_is_the_same(
    script: list[tuple[int, str, bool]], kind: RequestOutputKind
) -> None:
    transcript, cursor = Transcript(), Cursor(kind)
    read: list[RequestOutput] = []
    said: dict[int, tuple[str, list[int]]] = {}
    for number, (index, text, reads) in enumerate(script):
        transcript.add(output(piece(text, [number], index=index)))
        before, ids = said.get(index, ("", []))
        said[index] = (before + text, [*ids, number])
        if reads and (one := transcript.read(cursor, "mine")):
            read.append(one)
    transcript.add(
        output(*(piece("", [], index=index, end="stop") for index in said), finished=True)
    )
    last = transcript.read(cursor, "mine")
    assert last is not None
    read.append(last)
    assert last.finished
    assert {one.request_id for one in read} == {"mine"}
    assert whole(read, kind) == said
    assert transcript.read(cursor, "mine") is None
    assert len(read) == 1 or kind != FINAL_ONLY


def test_what_a_reader_does_to_its_output_stays_there() -> None:
    transcript = Transcript()
    first = output(piece("one", [1], logprobs=True))
    first.prompt_logprobs = [None, {2: Logprob(float("-inf"), 1, "p")}]
    transcript.add(first)
    mine = transcript.read(Cursor(CUMULATIVE), "mine")
    assert mine is not None
    clamp_prompt_logprobs(mine.prompt_logprobs)  # vLLM's handlers do so, in place
    mine.prompt_logprobs.pop(0)
    mine.outputs[0].text = "spoilt"
    mine.outputs[0].logprobs[0][1].logprob = 9.0
    mine.outputs[0].token_ids.append(9)
    mine.outputs[0].logprobs.clear()
    mine.prompt_token_ids.clear()
    mine.add(output(piece("more", [2], logprobs=True)), aggregate=True)
    transcript.add(output(piece(" two", [2], end="stop", logprobs=True), finished=True))
    theirs = transcript.read(Cursor(CUMULATIVE), "theirs")
    assert theirs is not None
    assert theirs.outputs[0].text == "one two"
    assert theirs.outputs[0].token_ids == [1, 2]
    assert [position[at].logprob for at, position in enumerate(theirs.outputs[0].logprobs, 1)] == [
        -1.0,
        -1.0,
    ]
    assert theirs.prompt_logprobs == [None, {2: Logprob(float("-inf"), 1, "p")}]
    assert theirs.prompt_token_ids == [1, 2]


def finished(*, end: str = "stop") -> Transcript:
    transcript = Transcript()
    transcript.add(output(piece("a", [1], logprobs=True), piece("b", [2], index=1, logprobs=True)))
    transcript.add(
        output(
            piece("c", [3], end=end, logprobs=True),
            piece("d", [4], index=1, end="length", logprobs=True),
            finished=True,
        )
    )
    return transcript


def test_packed_and_replayed_it_reads_the_same() -> None:
    from tests.unit.engine_parts import answer

    transcript = finished()
    completions, prompt_logprobs = pack(transcript)
    stored = answer().__class__(
        **{**vars(answer()), "completions": completions, "prompt_logprobs": prompt_logprobs}
    )
    again = replay(stored, prompt="p", prompt_token_ids=(1, 2), lora_request=None)
    for kind in RequestOutputKind:
        one, other = (each.read(Cursor(kind), "r") for each in (transcript, again))
        assert one is not None
        assert other is not None
        assert one.outputs == other.outputs
        assert (one.prompt, one.prompt_token_ids) == (other.prompt, other.prompt_token_ids)


@pytest.mark.parametrize("where", ["output", "completion"])
def test_what_a_newer_vllm_says_besides_is_not_lost(where: str) -> None:
    """A field that is not known may belong to the answer: it is handed on, and never stored."""
    transcript = finished()
    assert transcript.head is not None
    holder = transcript.head if where == "output" else transcript.choices[1].latest
    vars(holder)["novelty"] = []
    pack(transcript)
    vars(holder)["novelty"] = {"new": 1}
    read = transcript.read(Cursor(RequestOutputKind.FINAL_ONLY), "r")
    assert read is not None
    given = read if where == "output" else read.outputs[1]
    assert given.novelty == {"new": 1}
    with pytest.raises(NotStorableError, match="novelty"):
        pack(transcript)


@pytest.mark.parametrize("end", ["abort", "error", None])
def test_what_did_not_end_by_itself_is_not_stored(end: str) -> None:
    with pytest.raises(NotStorableError, match="ended in"):
        pack(finished(end=end))


def test_what_has_not_ended_is_not_stored() -> None:
    transcript = Transcript()
    transcript.add(output(piece("a", [1])))
    with pytest.raises(NotStorableError, match="not finished"):
        pack(transcript)
