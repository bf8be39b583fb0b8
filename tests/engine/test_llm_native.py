"""What holds for vLLM's engine holds for ours: kinds of output, n, stops, prompts of every form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMValidationError
from vllm.outputs import STREAM_FINISHED
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from schema.jobs import Reuse
from tests.engine.conftest import Equipped, final_of, greedy, idle, joined, outputs_of
from workers.engine import RequestScope

pytestmark = pytest.mark.engine

KINDS = list(RequestOutputKind)


def as_plain(output: Any) -> dict[str, Any]:
    """Return what a reader of vLLM's outputs can see, one completion a line."""
    return {
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "prompt_logprobs": output.prompt_logprobs,
        "finished": output.finished,
        "outputs": [
            (
                piece.index,
                piece.text,
                list(piece.token_ids),
                piece.finish_reason,
                piece.stop_reason,
                piece.cumulative_logprob,
                piece.logprobs,
                piece.lora_request,
            )
            for piece in output.outputs
        ],
    }


async def natively(llm: Equipped, prompt: Any, params: Any, request_id: str) -> list[Any]:
    """Return all outputs of one request of vLLM's own, not ours."""
    collector = await AsyncLLM.add_request(llm, request_id, prompt, params)
    outputs: list[Any] = []
    while not outputs or not outputs[-1].finished:
        outputs.append(await collector.get())
    return outputs


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_is_vllms_and_so_is_its_repeat(
    plain: Equipped, kind: RequestOutputKind
) -> None:
    params = greedy(12, output_kind=kind)
    native = await natively(plain, "The sky is blue because", params, "native")
    made = await outputs_of(plain, "The sky is blue because", params, "made")
    again = await outputs_of(plain, "The sky is blue because", params, "again")
    assert joined(native, kind) == joined(made, kind) == joined(again, kind)
    assert made[-1].outputs[0].finish_reason == again[-1].outputs[0].finish_reason == "length"
    assert (made[0].request_id, again[0].request_id) == ("made", "again")
    assert not made[-1].metadata["cached"]
    assert again[-1].metadata["cached"]
    assert again[-1].metadata["provenance"] == "exact"


async def test_one_kinds_answer_serves_the_other_kinds(plain: Equipped) -> None:
    texts = []
    for kind in (*KINDS, *KINDS):
        outputs = await outputs_of(plain, "Rivers flow to", greedy(6, output_kind=kind))
        texts.append(joined(outputs, kind))
    assert all(text == texts[0] for text in texts)
    assert plain.stats()["generated"] == 1


async def test_several_seeded_answers_with_logprobs_are_replayed_whole(plain: Equipped) -> None:
    params = SamplingParams(
        n=2,
        temperature=0.9,
        seed=11,
        max_tokens=6,
        logprobs=2,
        prompt_logprobs=1,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    made = await final_of(plain, "Two ways to say hello:", params)
    again = await final_of(plain, "Two ways to say hello:", params)
    assert [piece.index for piece in made.outputs] == [0, 1]
    assert made.outputs[0].logprobs is not None
    assert made.prompt_logprobs is not None
    assert as_plain(made) == as_plain(again)
    assert again.metadata["cached"]
    # All that is not replayed is vLLM's label of the weights, of which an engine of ours has one.
    differ = {
        name
        for one, other in zip(made.outputs, again.outputs, strict=True)
        for name in vars(one)
        if getattr(one, name) != getattr(other, name)
    }
    assert differ <= {"weight_versions"}


async def test_seeded_answers_stream_as_they_were_made(plain: Equipped) -> None:
    def params(kind: RequestOutputKind) -> SamplingParams:
        return SamplingParams(
            n=3, temperature=1.0, seed=5, max_tokens=5, logprobs=1, output_kind=kind
        )

    kind = RequestOutputKind.DELTA
    made = await outputs_of(plain, "Three colours:", params(kind))
    again = await outputs_of(plain, "Three colours:", params(kind))
    whole = await final_of(plain, "Three colours:", params(RequestOutputKind.FINAL_ONLY))
    assert joined(made, kind) == joined(again, kind)
    assert joined(made, kind) == joined([whole], RequestOutputKind.FINAL_ONLY)
    logprobs: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for output in again:
        for piece in output.outputs:
            logprobs[piece.index] += piece.logprobs or []
    assert logprobs == {piece.index: piece.logprobs for piece in whole.outputs}


async def test_a_stop_string_is_replayed(plain: Equipped) -> None:
    whole = await final_of(plain, "Count: one, two, three,", greedy(12))
    word = whole.text.split()[2]
    for cached in (False, True):
        output = await final_of(plain, "Count: one, two, three,", greedy(12, stop=[word]))
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].stop_reason == word
        assert word not in output.text
        assert output.metadata["cached"] == cached


async def test_text_ids_and_rendered_input_are_one_request(plain: Equipped) -> None:
    text = "The capital of France is"
    first = await final_of(plain, text, greedy())
    ids = first.prompt_token_ids
    (rendered,) = await plain.renderer.render_cmpl_async([{"prompt": text}])
    for prompt in ({"prompt_token_ids": ids}, {"prompt": text}, rendered):
        output = await final_of(plain, prompt, greedy())
        assert output.metadata["cached"], prompt
        assert output.text == first.text
        assert output.prompt_token_ids == ids
    assert plain.stats()["generated"] == 1


async def test_tokenization_arguments_reach_the_tokenizer(plain: Equipped) -> None:
    kwargs = {"truncate_prompt_tokens": 3}
    long = await final_of(plain, "one two three four five six", greedy())
    short = await final_of(
        plain, "one two three four five six", greedy(), tokenization_kwargs=kwargs
    )
    assert len(short.prompt_token_ids) == 3 < len(long.prompt_token_ids)
    assert not short.metadata["cached"]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
async def test_streaming_input_passes_through(plain: Equipped) -> None:
    async def parts() -> AsyncGenerator[StreamingInput, None]:
        for text in ("Once upon", " a time"):
            yield StreamingInput(prompt=text)

    params = SamplingParams(temperature=0.0, max_tokens=4, output_kind=RequestOutputKind.DELTA)
    collector = await plain.add_request("streaming", parts(), params)
    assert type(collector.parent_collector).__name__ == "RequestOutputCollector"
    seen = [output async for output in collector.aiter()]
    assert "".join(output.text for output in seen)
    assert seen[-1].metadata["not_reusable"] == "streaming input is passed through"
    assert len([output async for output in plain.generate(parts(), params, "generated")]) > 1


async def test_the_end_of_streaming_input_is_vllms_own_object(plain: Equipped) -> None:
    async def nothing() -> AsyncGenerator[StreamingInput, None]:
        for part in list[Any]():
            yield part

    params = SamplingParams(temperature=0.0, max_tokens=4, output_kind=RequestOutputKind.DELTA)
    collector = await plain.add_request("empty", nothing(), params)
    assert await collector.get() is STREAM_FINISHED
    assert [output async for output in plain.generate(nothing(), params, "empty")] == []


async def test_a_raw_engine_request_passes_through(plain: Equipped) -> None:
    params = greedy(3)
    (rendered,) = await plain.renderer.render_cmpl_async([{"prompt": "Raw"}])
    tasks = await plain.get_supported_tasks()
    for number in range(2):
        raw = plain.input_processor.process_inputs(
            f"raw-{number}", rendered, params, supported_tasks=tasks
        )
        output = await final_of(plain, raw, params, f"raw-{number}")
        assert output.text
        assert output.metadata["not_reusable"] == "a raw engine request is passed through"


@pytest.mark.parametrize(
    ("params", "why"),
    [
        (SamplingParams(temperature=0.8, max_tokens=3), "sampled without a seed"),
        (greedy(3, extra_args={"mine": 1}), "it carries extra arguments"),
        (greedy(3, flat_logprobs=True, logprobs=1), "flat log probabilities are not stored"),
    ],
)
async def test_what_is_not_reused_says_why(
    plain: Equipped, params: SamplingParams, why: str
) -> None:
    for _ in range(2):
        output = await final_of(plain, "Passed through", params)
        assert not output.metadata["cached"]
        assert output.metadata["provenance"] == "generated"
        assert output.metadata["not_reusable"] == why
        assert output.metadata["processing_time"]["generate"] > 0
        assert output.text
    assert len(plain.memory) == 0
    stats = plain.stats()
    assert (stats["requests"], stats["generated"], stats["hit_rate"]) == (2, 2, 0)
    assert stats["stages"]["generate"]["times"] == 2


@pytest.mark.parametrize("reuse", [Reuse.EXACT, Reuse.OFF])
async def test_what_steers_a_request_reaches_the_core(
    plain: Equipped, monkeypatch: pytest.MonkeyPatch, reuse: Reuse
) -> None:
    """Priority, rank, trace and time of arrival; they do not change the answer, nor its key."""
    seen: list[Any] = []
    core = plain.engine_core
    send = core.add_request_async

    async def watched(request: Any) -> None:
        seen.append(request)
        await send(request)

    monkeypatch.setattr(core, "add_request_async", watched)
    # Without a collector of traces vLLM drops their headers.
    monkeypatch.setattr(plain.observability_config, "otlp_traces_endpoint", "grpc://nowhere:1")
    steering: dict[str, Any] = {
        "priority": 7,
        "data_parallel_rank": 0,
        "trace_headers": {"traceparent": "00-aa-bb-01"},
        "arrival_time": 1000.5,
    }
    with RequestScope(reuse=reuse).active():
        output = await final_of(plain, "Steered", greedy(2), **steering)
        again = await final_of(plain, "Steered", greedy(2), priority=1)
    assert output.text
    for name, value in steering.items():
        assert getattr(seen[0], name) == value
    assert again.metadata["cached"] is (reuse == Reuse.EXACT)
    assert len(seen) == (1 if reuse == Reuse.EXACT else 2)
    with pytest.raises(VLLMValidationError, match="data_parallel_rank 5"):
        await plain.add_request("rank", "Steered elsewhere", greedy(2), data_parallel_rank=5)
    assert plain.stats()["flights"] == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "x " * 3000,
        {"prompt_token_ids": [10**7]},
        {"prompt": "Look", "multi_modal_data": {"image": Image.new("RGB", (2, 2))}},
    ],
)
async def test_a_bad_prompt_is_refused_as_vllm_refuses_it(plain: Equipped, prompt: Any) -> None:
    async def refusal(add: Any, *args: Any) -> Exception:
        with pytest.raises(Exception, match=r".") as caught:
            await add(*args, "bad", prompt, greedy())
        return caught.value

    theirs = await refusal(AsyncLLM.add_request, plain)
    ours = await refusal(plain.add_request)
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)
    assert isinstance(ours, VLLMValidationError | ValueError)
    assert plain.stats()["flights"] == 0
    assert len(plain.memory) == 0


async def test_bad_parameters_are_refused_for_everybody_on_the_flight(plain: Equipped) -> None:
    params = greedy(4, logprobs=100_000)
    with pytest.raises(VLLMValidationError):
        await plain.add_request("bad", "A prompt", params)
    results = await asyncio.gather(
        *(final_of(plain, "A prompt", params, f"bad-{i}") for i in range(3)),
        return_exceptions=True,
    )
    assert all(isinstance(result, VLLMValidationError) for result in results)
    await idle(plain)


async def test_arguments_that_do_not_fit_are_pythons_error(plain: Equipped) -> None:
    with pytest.raises(TypeError, match="missing"):
        await plain.add_request("one")
    with pytest.raises(TypeError, match="unexpected"):
        await plain.add_request("one", "p", greedy(), novelty=1)
    with pytest.raises(TypeError, match="multiple values"):
        await plain.add_request("one", "p", greedy(), prompt="q")


async def test_an_abort_is_told_and_never_stored(plain: Equipped) -> None:
    scope = RequestScope(reuse=Reuse.EXACT)
    with scope.active():
        collector = await plain.add_request(
            "aborted",
            "A story without end",
            SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True),
        )
    await collector.get()
    await plain.abort("aborted")
    while not (output := await collector.get()).finished:
        pass
    assert output.outputs[0].finish_reason == "abort"
    await idle(plain)
    assert len(plain.memory) == 0
    assert plain.stats()["flights"] == 0


async def test_leaving_the_iterator_aborts(plain: Equipped) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    collector = await plain.add_request("left", "Another story without end", params)
    outputs = collector.aiter()
    await anext(outputs)
    await outputs.aclose()
    await idle(plain)
    generated = plain.generate("One more story", params, "generated")
    await anext(generated)
    await generated.aclose()
    await idle(plain)


@pytest.mark.parametrize("kind", KINDS)
async def test_of_many_at_once_some_leave_and_the_others_get_all(
    plain: Equipped, kind: RequestOutputKind
) -> None:
    """As vLLM tests its own engine: load, aborts half-way, and nothing left behind."""
    params = greedy(16, ignore_eos=True, output_kind=kind)

    async def read(number: int) -> int | None:
        outputs = []
        reading = plain.generate(f"Number {number} says", params, f"r{number}")
        async for output in reading:
            outputs.append(output)
            if number % 7 == 0 and not output.finished:
                await reading.aclose()
                return None
        assert outputs[-1].finished
        assert [output.finished for output in outputs].count(True) == 1
        return len(joined(outputs, kind)[0][1])

    counted = await asyncio.gather(*(read(number) for number in range(40)))
    stayed = [count for number, count in enumerate(counted) if number % 7]
    assert stayed == [16] * len(stayed)
    await idle(plain)
    assert plain.stats()["flights"] == 0
    await plain.check_health()
    assert (await final_of(plain, "Number 1 says", params)).metadata["cached"]


async def test_an_engine_that_is_paused_ends_what_it_shared_and_goes_on(plain: Equipped) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
    collectors = [await plain.add_request(f"r{i}", "Until the pause", params) for i in range(2)]
    await collectors[0].get()
    await plain.pause_generation(mode="abort")
    assert await plain.is_paused()
    for collector in collectors:
        while not (output := await collector.get()).finished:
            pass
        assert output.outputs[0].finish_reason == "abort"
        assert "abort" in output.metadata["not_reusable"]
    assert len(plain.memory) == 0
    waiting = asyncio.create_task(final_of(plain, "After the pause", greedy(3)))
    await plain.resume_generation()
    assert (await waiting).text
