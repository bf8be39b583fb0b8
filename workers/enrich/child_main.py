"""A child process that holds one model: ``python -m workers.enrich.child_main KIND FD CONFIG``.

It reads requests from a socket, answers them in order, and ends when the socket closes or when
its parent dies, however that happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workers.enrich import frames
from workers.enrich.lifeline import die_with_parent

if TYPE_CHECKING:
    from io import BufferedRWPair

#: A model: texts in, one payload a text out, in order, as they get done.
Model = Callable[[Sequence[str]], Iterator[bytes]]

# A tenth of a core that a CPU engine fills, which is at 5 itself: enough for what it enriches, and
# its steps hardly wait for that. Five steps apart took 9 % of its throughput on two cores, ten 5 %.
_NICE = 15


def main(arguments: Sequence[str]) -> int:
    """Load the model and answer until the socket closes.

    Args:
        arguments: Kind of model, number of the inherited socket, its configuration as JSON.

    Returns:
        The exit status: 0, or 1 when the model could not be loaded.
    """
    kind, descriptor, config = arguments
    values = json.loads(config)
    die_with_parent(values.pop("parent_pid"))
    _stand_back()
    with socket.socket(fileno=int(descriptor)) as connection, connection.makefile("rwb") as stream:
        try:
            model = _load(kind, values)
        except Exception as exc:  # noqa: BLE001  it is told to the parent, which names it
            _send(stream, frames.pack_reply(frames.READY, _message(exc), ok=False))
            return 1
        _send(stream, frames.pack_reply(frames.READY, b""))
        while (texts := frames.read_request(stream)) is not None:
            _answer(model, texts, stream)
    return 0


def _load(kind: str, config: dict[str, Any]) -> Model:
    if kind == "spacy":
        from workers.enrich.spacy_model import SpacyModel

        return SpacyModel(**config)
    if kind == "minilm":
        from workers.enrich.minilm_model import MiniLmModel

        return MiniLmModel(**config)
    msg = f"no model of kind {kind!r}"
    raise ValueError(msg)


def _answer(model: Model, texts: Sequence[str], stream: BufferedRWPair) -> None:
    """Answer a request; a text that fails does not take the others along."""
    done = 0
    try:
        for payload in model(texts):
            _send(stream, frames.pack_reply(done, payload))
            done += 1
    except OSError:
        raise
    except Exception as exc:  # noqa: BLE001  it is told to the parent, with the text it belongs to
        if len(texts) == 1:
            _send(stream, frames.pack_reply(0, _message(exc), ok=False))
            return
    for index in range(done, len(texts)):
        try:
            reply = frames.pack_reply(index, next(iter(model([texts[index]]))))
        except Exception as exc:  # noqa: BLE001  as above
            reply = frames.pack_reply(index, _message(exc), ok=False)
        _send(stream, reply)


def _send(stream: BufferedRWPair, frame: bytes) -> None:
    stream.write(frame)
    stream.flush()


def _message(exc: Exception) -> bytes:
    return f"{type(exc).__name__}: {exc}"[:2000].encode("utf-8", "replace")


def _stand_back() -> None:
    """Let others go first: on a CPU it shares cores with generation, which somebody waits for."""
    os.nice(_NICE)
    if sys.platform == "linux":
        # Being woken by a request, it does not take the core from whoever sent it.
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError:  # the parent went away in the middle of a reply
        os._exit(1)
