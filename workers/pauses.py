"""Keeps the garbage collector out of the way: of the event loop, and of what is made in bulk.

A full collection looks at every container in the process: half a second's worth once vLLM is
imported, and a tenth more with a full memory tier. What has survived one is here to stay, so it is
set aside, and the next looks at what came since. Counting references frees what is set aside as it
does everything else; only a ring of objects that closed before and fell apart afterwards would
stay, and there are few.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

#: For `gc.set_threshold`. A full collection follows every second one of the middle generation, and
#: then looks at some 7,000 containers, which takes a few milliseconds; by Python's own numbers it
#: would be 70,000.
_OFTEN = (700, 5, 1)


@contextlib.contextmanager
def short_pauses() -> Iterator[None]:
    """Set aside what there is now, and what survives each full collection from now on."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    # Python puts a full collection off until a quarter has come to what the last one found. That
    # must not be all that was just set aside, or the next is as long as this one.
    gc.collect()
    gc.set_threshold(*_OFTEN)
    gc.callbacks.append(_set_aside)
    try:
        yield
    finally:
        gc.callbacks.remove(_set_aside)
        gc.set_threshold(*thresholds)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Let the garbage collector rest while values are made by the thousand and none is garbage.

    It would look at all of them, and in between at everything else in the process, again and again:
    for results of a channel that took five times as long as to read them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _set_aside(phase: str, info: dict[str, Any]) -> None:
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()
