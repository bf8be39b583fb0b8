"""Enrichers of other packages run aside: whatever they do, the engine's event loop goes on."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from workers.engine.protocols import Enricher
from workers.enrich.aside import Aside
from workers.enrich.plugins import load_plugins


class Blocking:
    """Waits without asyncio, as a driver that knows none does."""

    name = "blocking"

    def __init__(self) -> None:
        self.begun, self.free = threading.Event(), threading.Event()
        self.loops: set[int] = set()
        self.cut = threading.Event()

    async def enrich(self, text: str, *, namespace: str) -> Mapping[str, Any]:
        self.loops.add(id(asyncio.get_running_loop()))
        self.begun.set()
        if text == "fail":
            msg = "no"
            raise ValueError(msg)
        if text == "wait":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cut.set()
                raise
        self.free.wait()
        return {"text": text, "namespace": namespace}

    async def aclose(self) -> None:
        self.loops.add(id(asyncio.get_running_loop()))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "promptmill-bl" in thread.name]


async def met(event: threading.Event) -> None:
    async with asyncio.timeout(10):
        while not event.is_set():
            await asyncio.sleep(0.005)


async def gone() -> None:
    async with asyncio.timeout(10):
        while threads():
            await asyncio.sleep(0.005)


async def test_one_that_blocks_keeps_nobody() -> None:
    plugin = Blocking()
    aside = Aside(plugin)
    assert isinstance(aside, Enricher)
    assert aside.name == "blocking"
    asked = asyncio.create_task(aside.enrich("one", namespace="n"))
    await met(plugin.begun)
    async with asyncio.timeout(10):
        asked.cancel()  # as the engine does with what is over its budget
        with pytest.raises(asyncio.CancelledError):
            await asked
        plugin.free.set()
        assert await aside.enrich("two", namespace="n") == {"text": "two", "namespace": "n"}
        await aside.aclose()
        await aside.aclose()
    await gone()
    assert len(plugin.loops) == 1
    assert id(asyncio.get_running_loop()) not in plugin.loops
    with pytest.raises(RuntimeError, match="blocking was closed"):
        await aside.enrich("three", namespace="n")


async def test_errors_and_cuts_cross_over() -> None:
    plugin = Blocking()
    aside = Aside(plugin)
    with pytest.raises(ValueError, match="no"):
        await aside.enrich("fail", namespace="n")
    plugin.begun.clear()
    asked = asyncio.create_task(aside.enrich("wait", namespace="n"))
    await met(plugin.begun)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await asked
    await met(plugin.cut)
    await aside.aclose()
    await gone()


async def test_one_that_never_comes_back_does_not_keep_its_end_from_being_bounded() -> None:
    plugin = Blocking()
    aside = Aside(plugin)
    asked = asyncio.create_task(aside.enrich("one", namespace="n"))
    await met(plugin.begun)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await aside.aclose()
    asked.cancel()
    plugin.free.set()
    await gone()


def test_what_is_installed_runs_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(name="b", value="b:Blocking", dist=None, load=lambda: Blocking)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [entry])
    (found,) = load_plugins().enrichers
    assert isinstance(found, Aside)
