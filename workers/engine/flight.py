"""Coalescing: identical requests in flight share one generation, a *flight*.

The flight has a task of its own that asks the store, else starts the generation and pumps vLLM's
collector into a transcript; no reader's cancellation touches it. Each reader has its own request
id, cursor and copies. When the last reader has left, the generation is aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

from vllm.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from workers.engine.notes import FlightNotes
from workers.engine.transcript import Cursor, Transcript

Output: TypeAlias = RequestOutput | PoolingRequestOutput


class Source(Protocol):
    """Where a collector's outputs come from."""

    def get_nowait(self) -> Output | None:
        """Return the next output, or None when there is none yet."""
        ...

    async def wait(self) -> None:
        """Return once `get_nowait` has something to return or to raise."""
        ...

    def close(self) -> None:
        """Stop reading; idempotent."""
        ...


class NativeSource:
    """vLLM's own collector, untouched.

    Args:
        parent: What `AsyncLLM.add_request` returned.
    """

    def __init__(self, parent: RequestOutputCollector) -> None:
        self.parent = parent
        self._pieces: list[str] = []

    def get_nowait(self) -> Output | None:
        """Return the next output, or None when there is none yet."""
        output = self.parent.get_nowait()
        if isinstance(output, RequestOutput):
            for piece in output.outputs:
                if piece.index == 0:
                    if not self.parent.aggregate:  # no deltas: each has the whole text so far
                        self._pieces.clear()
                    self._pieces.append(piece.text)
        return output

    def text(self) -> str:
        """Return the first completion's text, as far as it has been read."""
        return "".join(self._pieces)

    async def wait(self) -> None:
        """Return once there is an output or an error."""
        await self.parent.ready.wait()

    def close(self) -> None:
        """Close the parent."""
        self.parent.close()


class Stream:
    """A transcript that grows, and those who read it."""

    def __init__(self) -> None:
        self.transcript = Transcript()
        self.pooled: PoolingRequestOutput | None = None
        self.error: BaseException | None = None
        self.readers: set[Reader] = set()
        #: What to do when the last reader has left; set by the flight.
        self.on_empty: Callable[[], None] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or self.pooled is not None or self.transcript.finished

    def publish(self) -> None:
        """Wake every reader."""
        for reader in self.readers:
            reader.news.set()


class Reader:
    """One reader of a stream; a `Source`.

    Args:
        stream: To read from.
        request_id: The reader's own, given to each of its outputs.
        kind: How its outputs are cut.
    """

    def __init__(self, stream: Stream, *, request_id: str, kind: RequestOutputKind) -> None:
        self.stream = stream
        self.request_id = request_id
        self.flight: Flight | None = None  # None when a stored answer is read
        self.news = asyncio.Event()
        self._cursor = Cursor(kind)
        self._aborted = False
        stream.readers.add(self)
        self.news.set()

    def get_nowait(self) -> Output | None:
        """Return what is new as an output of this reader's own, or None.

        Raises:
            BaseException: What ended the generation; the same for every reader.
        """
        self.news.clear()
        if self._aborted:
            self._aborted = False
            return self._abort_output()
        output = self.stream.transcript.read(self._cursor, self.request_id)
        if output is not None:
            return output
        if self.stream.pooled is not None and not self._cursor.finished:
            self._cursor.finished = True
            return self._pooled_copy(self.stream.pooled)
        if self.stream.error is not None and not self._cursor.finished:
            self._cursor.finished = True
            raise self.stream.error
        return None

    async def wait(self) -> None:
        """Return once there may be something new."""
        if not (self._aborted or self._has_news()):
            await self.news.wait()

    def close(self) -> None:
        """Leave the stream; the last to leave ends the generation."""
        if self in self.stream.readers:
            self.stream.readers.discard(self)
            if not self.stream.readers and self.stream.on_empty is not None:
                self.stream.on_empty()

    def inject(self, output: Output | Exception) -> None:
        """Hand something from outside to this reader's stream.

        Args:
            output: An error ends the stream for all; an output is added to it.
        """
        if isinstance(output, BaseException):
            self.stream.error = output
        elif isinstance(output, PoolingRequestOutput):
            self.stream.pooled = output
        else:
            self.stream.transcript.add(output)
        self.stream.publish()

    def abort(self) -> None:
        """Leave the stream, and hand the consumer a final output that says ``abort``."""
        if not self._cursor.finished and not self.stream.finished:
            self._aborted = True
            self.news.set()
        self.close()

    def _has_news(self) -> bool:
        stream = self.stream
        return stream.transcript.has_news(self._cursor) or (
            not self._cursor.finished and (stream.pooled is not None or stream.error is not None)
        )

    def _pooled_copy(self, output: PoolingRequestOutput) -> PoolingRequestOutput:
        # Not through __init__: fields that a newer vLLM adds must come along.
        own = copy.copy(output)
        own.request_id = self.request_id
        own.prompt_token_ids = list(output.prompt_token_ids)
        own.outputs = copy.deepcopy(output.outputs)
        return own

    def _abort_output(self) -> RequestOutput:
        cursor, transcript = self._cursor, self.stream.transcript
        output = transcript.read(cursor, self.request_id) or RequestOutput(
            request_id=self.request_id,
            prompt=None,
            prompt_token_ids=[],
            prompt_logprobs=None,
            outputs=[],
            finished=True,
        )
        if not output.outputs:
            output.outputs = [
                CompletionOutput(
                    index=0, text="", token_ids=[], cumulative_logprob=None, logprobs=None
                )
            ]
        for piece in output.outputs:
            piece.finish_reason = piece.finish_reason or "abort"
        output.finished = cursor.finished = True
        return output


class Flight:
    """One generation, shared by all who asked for it.

    Args:
        look_up: Fills the stream from the store and returns True, or returns False.
        start: Starts the generation by `AsyncLLM.add_request`, and what runs beside it.
        abort: Aborts a generation by vLLM's internal request id.
        turn: Waits for a turn of the loop that has time for one more start or end.
        landed: Called once with the flight when its generation is whole.
        gone: Called once when the flight has ended in whatever way; nobody can join it then.
        streams: Whether its outputs come as deltas while it grows.
    """

    def __init__(
        self,
        *,
        look_up: Callable[[Stream], Awaitable[bool]],
        start: Callable[[], Awaitable[RequestOutputCollector]],
        abort: Callable[[str], Awaitable[None]],
        turn: Callable[[], Awaitable[None]],
        landed: Callable[[Flight], None],
        gone: Callable[[Flight], None],
        streams: bool,
    ) -> None:
        self.stream = Stream()
        self.stream.on_empty = self._abandon
        self.streams = streams
        self.native: RequestOutputCollector | None = None
        self.replayed = False  # the store had it
        self.notes = FlightNotes()
        self._look_up = look_up
        self._start = start
        self._abort = abort
        self._turn = turn
        self._landed = landed
        self._on_gone = gone
        self._ready = asyncio.Event()
        self._abandoned = False  # all readers have left it
        self._task = asyncio.create_task(self._fly(), name="promptmill-flight")

    def join(self, request_id: str, kind: RequestOutputKind) -> Reader:
        """Add a reader, who gets the stream from its start.

        Args:
            request_id: The reader's own.
            kind: How its outputs are cut.
        """
        return Reader(self.stream, request_id=request_id, kind=kind)

    async def ready(self) -> None:
        """Return once vLLM has accepted the request, or the store has answered it.

        Or once all have left it: whoever was aborted meanwhile has an output that says so.

        Raises:
            BaseException: Why vLLM refused it.
        """
        await self._ready.wait()
        if self.native is None and self.stream.error is not None and not self._abandoned:
            raise self.stream.error

    async def ended(self) -> None:
        """Wait until the flight's task is over; what it raised went to the readers."""
        await asyncio.wait([self._task])  # and not the task itself: who waits may be cancelled

    def cancel(self) -> None:
        """End the flight now."""
        self._task.cancel()

    def _abandon(self) -> None:
        if not self.stream.finished:
            self._abandoned = True
            self._is_gone()
            self._task.cancel()

    def _is_gone(self) -> None:
        gone, self._on_gone = self._on_gone, _nothing
        gone(self)

    async def _fly(self) -> None:
        stream = self.stream
        starting: asyncio.Future[RequestOutputCollector] | None = None
        try:
            if await self._look_up(stream):
                self.replayed = True
            else:
                await self._turn()
                starting = asyncio.ensure_future(self._start())
                self.native = await asyncio.shield(starting)
                self._ready.set()
                await self._pump(self.native)
            self._landed(self)
        except asyncio.CancelledError:
            # Whoever still reads is told what vLLM tells its readers when it goes away.
            stream.error = EngineDeadError()
            if starting is not None:
                # A request half added would run on unseen: let it in, then abort it.
                with contextlib.suppress(Exception):
                    await self._abort((await starting).request_id)
            raise
        except Exception as exc:  # noqa: BLE001  it reaches every reader, whatever it is
            stream.error = exc
        finally:
            self._is_gone()
            self._ready.set()
            stream.publish()
            if self.native is not None:
                self.native.close()

    async def _pump(self, native: RequestOutputCollector) -> None:
        stream = self.stream
        while not stream.finished:
            output = native.get_nowait() or await native.get()
            if output.finished:
                await self._turn()
            if isinstance(output, PoolingRequestOutput):
                stream.pooled = output
            else:
                stream.transcript.add(output)
            if stream.finished:
                # Memory has it before anybody is told, so that nobody can fall between.
                return
            stream.publish()


def _nothing(_: Flight) -> None:
    """What is done a second time."""
