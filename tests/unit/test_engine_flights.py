"""Who joins a flight, and what vLLM is asked for on behalf of all."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.unit.engine_parts import MemoryStore, Native, answer, output, piece
from workers.cache.memory import MemoryCache
from workers.engine.breaker import Breaker
from workers.engine.config import Features, HandlerConfig
from workers.engine.durable import DurableTier
from workers.engine.enrichment import Enrichers
from workers.engine.flights import Flights
from workers.engine.pace import Pace
from workers.engine.plan import RequestPlan
from workers.engine.protocols import StoredAnswer
from workers.engine.scope import RequestScope
from workers.engine.side_tasks import SideTasks
from workers.engine.stats import EngineStats

CONFIG = HandlerConfig(features=Features(nlp=False, similarity=False, plugins=False))


class Waiting(MemoryStore):
    """A store that is asked and has not answered yet."""

    def __init__(self) -> None:
        super().__init__()
        self.free = asyncio.Event()

    async def get(self, namespace: str, fingerprint: bytes) -> StoredAnswer | None:
        await self.free.wait()
        return await super().get(namespace, fingerprint)


class Airport:
    """Flights over a store and an engine that a test drives."""

    def __init__(self) -> None:
        self.store, self.native, self.asked = Waiting(), Native(), list[Any]()
        memory, stats, tasks = (
            MemoryCache(entries=9, max_bytes=99_999, ttl_s=9),
            EngineStats(),
            SideTasks(),
        )
        self.tasks, self.memory = tasks, memory
        self.durable = DurableTier(
            store=self.store,
            wait_s=0,
            memory=memory,
            breaker=Breaker("store"),
            stats=stats,
            tasks=tasks,
        )
        self.flights = Flights(
            config=CONFIG,
            enrichers=Enrichers(CONFIG),
            memory=memory,
            durable=self.durable,
            stats=stats,
            tasks=tasks,
            writes=tasks,
            pace=Pace(),
            engine=b"e",
            model="m",
            add=self.add,
            abort=self.native.abort,
        )

    async def add(self, **call: Any) -> Any:
        self.asked.append(call)
        return self.native.collector

    def board(
        self, request_id: str, priority: int | None, scope: RequestScope | None = None
    ) -> Any:
        params = SamplingParams(temperature=0.0, output_kind=RequestOutputKind.DELTA)
        call = {"request_id": request_id, "prompt": "p", "params": params}
        if priority is not None:
            call["priority"] = priority
        scope = scope or RequestScope()
        delivery: Any = SimpleNamespace(scope=scope, request_id=request_id, flight=None)
        self.flights.board(RequestPlan(call=call, key=b"k", engine=b"e"), delivery)
        return delivery.flight


@pytest.mark.parametrize(
    ("priorities", "asked"),
    [((5, -3, 9), -3), ((None, 4), None), ((None, -1), -1), ((2, None), 0), ((0, 1), 0)],
)
async def test_a_flight_is_as_urgent_as_its_most_urgent_reader(
    priorities: tuple[int | None, ...], asked: int | None
) -> None:
    airport = Airport()
    flights = {airport.board(f"r{at}", each) for at, each in enumerate(priorities)}
    assert len(flights) == 1
    airport.store.free.set()
    (flight,) = flights
    await flight.ready()
    airport.board("late", -100)  # vLLM has been asked: there is no way to tell it
    airport.native.collector.put(output(piece("a", [1], end="stop"), finished=True))
    await flight.ended()
    assert [call.get("priority") for call in airport.asked] == [asked]


@pytest.mark.parametrize("stays", [True, False])
async def test_enrichment_begins_when_vllm_has_the_request(
    stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    airport, has_it = Airport(), asyncio.Event()
    enriched: list[bool] = []
    monkeypatch.setattr(airport.flights, "enrich", lambda *_: enriched.append(has_it.is_set()))

    async def add(**call: Any) -> Any:
        airport.asked.append(call)
        await has_it.wait()
        return airport.native.collector

    monkeypatch.setattr(airport.flights, "_add", add)
    flight = airport.board("r", None)
    (reader,) = flight.stream.readers
    airport.store.free.set()
    async with asyncio.timeout(10):
        while not airport.asked:
            await asyncio.sleep(0)
        if not stays:
            reader.close()
        has_it.set()
        await (flight.ready() if stays else flight.ended())
        assert flight.notes.under_way.is_set()
    assert enriched == ([True] if stays else [])
    flight.cancel()
    await flight.ended()


@pytest.mark.parametrize("accepted", [True, False])
async def test_what_comes_late_is_stored_only_with_an_answer_that_is_accepted(
    accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    airport = Airport()
    airport.store.free.set()
    unmarked: list[bytes | None] = []
    monkeypatch.setattr(
        airport.durable, "unmark", lambda _, planned, __: unmarked.append(planned.key)
    )
    verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    flight = airport.board("r", None, RequestScope(deferred=True, verdict=verdict))
    flight.notes.late = True
    airport.native.collector.put(output(piece("a", [1], end="stop"), finished=True))
    async with asyncio.timeout(10):
        await flight.ended()
        for _ in range(20):
            await asyncio.sleep(0)
        assert airport.store.answers == {}, "it has not been accepted yet"
        verdict.set_result(accepted)
        while len(airport.tasks):
            await asyncio.sleep(0)
    assert len(airport.store.answers) == accepted
    assert unmarked == [b"k"]  # other workers may go on either way


async def test_no_time_at_all_is_not_for_ever() -> None:
    airport = Airport()
    airport.store.free.set()
    flight = airport.board("r", None, RequestScope(ttl_s=0))
    airport.native.collector.put(output(piece("a", [1], end="stop"), finished=True))
    await flight.ended()
    assert flight.notes.answer.expires_at is not None
    assert airport.memory.get(RequestScope().namespace, b"k") is None


async def test_an_answer_carries_the_tags_of_all_it_was_made_for() -> None:
    airport = Airport()
    airport.store.free.set()
    for number, tags in enumerate((("b", "a"), (), ("c", "a"))):
        flight = airport.board(f"r{number}", None, RequestScope(tags=tags))
    airport.native.collector.put(output(piece("a", [1], end="stop"), finished=True))
    await flight.ended()
    assert flight.notes.answer.tags == ("b", "a", "c")
    assert airport.memory.forget(tag="c") == 1


@pytest.mark.parametrize("withdrawn", ["a", "b"])
async def test_what_is_withdrawn_before_it_is_stored_is_not_stored(withdrawn: str) -> None:
    airport = Airport()
    airport.store.free.set()
    verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    scope = RequestScope(tags=("a",), deferred=True, verdict=verdict)
    flight = airport.board("r", None, scope)
    flight.notes.late = True
    airport.native.collector.put(output(piece("a", [1], end="stop"), finished=True))
    async with asyncio.timeout(10):
        await flight.ended()
        airport.memory.forget(tag=withdrawn)
        verdict.set_result(True)
        while len(airport.tasks):
            await asyncio.sleep(0)
    assert len(airport.store.answers) == (withdrawn == "b")


@pytest.mark.parametrize("withdrawn", [True, False])
async def test_what_was_read_before_it_was_withdrawn_is_not_remembered(withdrawn: bool) -> None:
    """Else memory would give it for minutes to come."""
    airport = Airport()
    stored = answer(b"k", namespace=RequestScope().namespace)
    await airport.store.put(stored)
    flight = airport.board("r", None)
    await asyncio.sleep(0)
    if withdrawn:
        airport.memory.forget(answer_ids=frozenset({stored.id}))
    airport.store.free.set()
    await flight.ended()
    assert flight.replayed
    assert len(airport.memory) == (not withdrawn)
