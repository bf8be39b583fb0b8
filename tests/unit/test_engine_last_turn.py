"""What a rendered chat asks, and what stands around it, whichever template made it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from workers.engine.last_turn import LastTurn

MARKS = (
    *("<|im_start|>", "<|im_end|>", "<s>", "[INST]", "[/INST]", "<|user|>", "<|end|>"),
    *("<|assistant|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|system|>"),
)
TURNS = LastTurn(SimpleNamespace(all_special_tokens=MARKS))

CHATML = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
LLAMA = (
    "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\n{asked}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
PHI = "<|system|>\n{system}<|end|>\n<|user|>\n{asked}<|end|>\n<|assistant|>\n"
MISTRAL = "<s>[INST] {system} [/INST] Yes.[INST] {asked} [/INST]"


@pytest.mark.parametrize("template", [CHATML, LLAMA, PHI, MISTRAL])
@pytest.mark.parametrize("asked", ["How are you?\n\nWell?", "Hello", "model it"])
def test_the_last_turn_is_what_is_asked(template: str, asked: str) -> None:
    found = TURNS.of(template.format(system="Be kind.", asked=asked))
    assert found is not None
    question, around = found
    assert question == asked
    assert "Be kind." in around
    assert TURNS.of(template.format(system="Be kind.", asked="Else")) == ("Else", around)
    other = TURNS.of(template.format(system="Be curt.", asked=asked))
    assert other is not None
    assert other[1] != around


def test_a_turn_that_the_model_is_to_go_on_with_stands_around() -> None:
    chat = CHATML.format(system="Be kind.", asked="Who?")
    one, other = (TURNS.of(chat + begun) for begun in ("It is", "It was"))
    assert one is not None
    assert other is not None
    assert one[0] == other[0] == "Who?"
    assert one[1] != other[1]


def test_a_text_without_turns_is_asked_as_it_is() -> None:
    assert TURNS.of("How are you?") is None
    assert TURNS.of("What does <s> mean in HTML?") is None
    assert TURNS.of("<|im_start|><|im_end|>") is None
    assert LastTurn(None).of("<s>How are you?") is None
