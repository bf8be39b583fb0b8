"""A flight is one generation for many readers, and ends when it should."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
import torch
from vllm.outputs import PoolingOutput, PoolingRequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from tests.unit.engine_parts import Native, answer, output, piece
from workers.engine.collector import EnhancedRequestOutputCollector
from workers.engine.flight import Reader, Stream
from workers.engine.replay import NotStorableError, stream_of, with_outputs

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


async def read(reader: Reader) -> list[str]:
    """Read to the end; return the texts as they came."""
    texts, done = [], False
    while not done:
        while (one := reader.get_nowait()) is None:
            await reader.wait()
        texts += [part.text for part in one.outputs]
        done = one.finished
    return texts


async def test_every_reader_gets_everything() -> None:
    native = Native()
    flight = native.flight()
    early = flight.join("early", DELTA)
    await flight.ready()
    native.collector.put(output(piece("a", [1])))
    while early.get_nowait() is None:
        await early.wait()
    late, final = flight.join("late", DELTA), flight.join("final", FINAL_ONLY)
    native.collector.put(output(piece("b", [2], end="stop"), finished=True))
    assert await asyncio.gather(read(early), read(late), read(final)) == [["b"], ["ab"], ["ab"]]
    await flight.ended()
    assert (native.started, native.landed, native.gone) == (1, [flight], [flight])
    assert native.aborted == []


async def test_what_the_store_has_is_not_generated() -> None:
    native = Native()
    flight = native.flight(stored=output(piece("kept", [1], end="stop"), finished=True))
    assert await read(flight.join("r", DELTA)) == ["kept"]
    await flight.ended()
    assert native.started == 0
    assert flight.replayed


async def test_one_who_leaves_does_not_end_it_and_the_last_does() -> None:
    native = Native()
    flight = native.flight()
    one, other = flight.join("one", DELTA), flight.join("other", DELTA)
    await flight.ready()
    one.close()
    one.close()
    assert native.gone == []
    other.close()
    await flight.ended()
    assert native.aborted == ["native-1"]
    assert native.gone
    assert native.landed == []


async def test_left_while_vllm_takes_it_in_it_is_aborted_all_the_same() -> None:
    native = Native()
    native.may_start.clear()
    flight = native.flight()
    reader = flight.join("r", DELTA)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reader.close()
    native.may_start.set()
    await flight.ended()
    assert native.started == 1
    assert native.aborted == ["native-1"]


async def test_aborted_while_vllm_takes_it_in_it_is_an_abort_and_no_dead_engine() -> None:
    native = Native()
    native.may_start.clear()
    flight = native.flight()
    reader = flight.join("r", DELTA)
    boarding = asyncio.create_task(flight.ready())
    await asyncio.sleep(0)
    reader.abort()
    native.may_start.set()
    await boarding
    last = reader.get_nowait()
    assert last is not None
    assert last.outputs[0].finish_reason == "abort"
    await flight.ended()
    assert native.aborted == ["native-1"]


async def test_a_refusal_reaches_all() -> None:
    native = Native(refusal=ValueError("too long"))
    flight = native.flight()
    readers = [flight.join(f"r{number}", DELTA) for number in range(3)]
    with pytest.raises(ValueError, match="too long"):
        await flight.ready()
    for reader in readers:
        with pytest.raises(ValueError, match="too long"):
            await read(reader)
        assert reader.get_nowait() is None
    assert native.landed == []


async def test_an_abort_gives_what_there_is_and_says_so() -> None:
    native = Native()
    flight = native.flight()
    one, other = flight.join("one", DELTA), flight.join("other", FINAL_ONLY)
    await flight.ready()
    native.collector.put(output(piece("a", [1])))
    while one.get_nowait() is None:
        await one.wait()
    for reader in (one, other):
        reader.abort()
        last = reader.get_nowait()
        assert last is not None
        assert last.finished
        assert last.outputs[0].finish_reason == "abort"
        assert last.request_id == reader.request_id
    await flight.ended()
    assert native.aborted == ["native-1"]


async def test_a_pooled_output_is_each_readers_own_and_stored_whole() -> None:
    def pooled() -> PoolingRequestOutput:
        data = torch.tensor([0.1, -2.5], dtype=torch.float32)
        return PoolingRequestOutput("native", PoolingOutput(data), [1, 2], 0, True)

    native = Native()
    flight = native.flight()
    readers = [flight.join(f"r{number}", FINAL_ONLY) for number in range(2)]
    await flight.ready()
    native.collector.put(pooled())
    for reader in readers:
        while (one := reader.get_nowait()) is None:
            await reader.wait()
        assert (one.request_id, one.outputs) == (reader.request_id, pooled().outputs)
        one.prompt_token_ids.clear()
        one.outputs.data.zero_()
        assert reader.get_nowait() is None
    stored = with_outputs(answer(), flight.stream)
    assert stored.kind == "pooling"
    stream = stream_of(
        stored, request_id="again", prompt=None, prompt_token_ids=(1, 2), lora_request=None
    )
    again = Reader(stream, request_id="again", kind=FINAL_ONLY).get_nowait()
    assert again.outputs == pooled().outputs
    assert again.outputs.data.dtype == torch.float32
    assert (again.request_id, again.prompt_token_ids) == ("again", [1, 2])


async def test_what_is_no_tensor_is_given_and_not_stored() -> None:
    native = Native()
    flight = native.flight()
    reader = flight.join("r", FINAL_ONLY)
    await flight.ready()
    data: Any = {"image": b"x"}
    native.collector.put(PoolingRequestOutput("native", PoolingOutput(data), [1], 0, True))
    await flight.ended()
    one = reader.get_nowait()
    assert one is not None
    assert one.outputs.data == data
    with pytest.raises(NotStorableError, match="dict"):
        with_outputs(answer(), flight.stream)


async def test_closed_by_its_owner_it_tells_its_readers() -> None:
    native = Native()
    flight = native.flight()
    reader = flight.join("r", DELTA)
    await flight.ready()
    flight.cancel()
    await flight.ended()
    with pytest.raises(EngineDeadError):
        await read(reader)
    assert native.aborted == ["native-1"]


async def test_who_waits_for_its_end_can_be_cancelled() -> None:
    flight = Native().flight()
    flight.join("r", DELTA)
    await flight.ready()
    waiting = asyncio.create_task(flight.ended())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not flight.stream.finished
    flight.cancel()
    await flight.ended()


async def test_a_reader_can_be_cancelled_at_any_moment() -> None:
    """Also in the one in which a look-up has just ended, and what it waited for besides has not."""
    race = asyncio.get_running_loop().create_future()
    stopping, may_stop = asyncio.Event(), asyncio.Event()

    class Slow(Reader):
        async def wait(self) -> None:
            try:
                await super().wait()
            finally:
                stopping.set()
                await may_stop.wait()

    delivery: Any = SimpleNamespace(
        adopt=lambda: None, racing=lambda: race, left=lambda: None, settled=lambda: True
    )
    collector = EnhancedRequestOutputCollector(
        request_id="r",
        output_kind=DELTA,
        source=Slow(Stream(), request_id="r", kind=DELTA),
        delivery=delivery,
        abort=AsyncMock(),
    )
    reading = asyncio.create_task(collector.get())
    async with asyncio.timeout(10):
        await asyncio.sleep(0.01)
        collector._source.news.clear()  # type: ignore[attr-defined]
        race.set_result(None)
        await stopping.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    may_stop.set()
    collector.close()
