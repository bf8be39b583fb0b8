"""`EnhancedRequestOutputCollector`: what `add_request` hands out.

It is a `RequestOutputCollector`, so vLLM's own `generate`, `encode` and OpenAI handlers read it as
they read theirs. It never makes outputs itself: they come from vLLM's collector, from a flight
shared with others, or from a stored answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

from vllm.outputs import STREAM_FINISHED, PoolingRequestOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from workers.engine.flight import NativeSource, Output, Reader, Source
from workers.engine.output import EnhancedRequestOutput


class Delivery(Protocol):
    """What the collector asks of whoever made it; the engine's side of one request."""

    def adopt(self) -> Source | None:
        """Return a better source, found since; only asked before the first output."""
        ...

    def racing(self) -> asyncio.Task[Any] | None:
        """Return the look-up that may bring a better source, while it runs."""
        ...

    def handed_out(self) -> None:
        """An output has gone to the consumer; no other source can be taken any more."""
        ...

    def arrived(self) -> None:
        """The final output is here; the wait for enrichment starts."""
        ...

    def settled(self) -> bool:
        """Whether the final output need not wait any longer."""
        ...

    async def settle(self) -> None:
        """Wait until `settled`."""
        ...

    def metadata(self, *, final: bool) -> dict[str, Any]:
        """Return the metadata of an output that is handed out now."""
        ...

    def left(self) -> None:
        """The consumer is gone; stop what ran for it alone."""
        ...


class EnhancedRequestOutputCollector(RequestOutputCollector):
    """Outputs of one request, enhanced.

    Args:
        request_id: Internal id, by which the request can be aborted.
        output_kind: As in the request's parameters.
        source: Where outputs come from at first.
        delivery: The engine's side of the request.
        abort: Aborts a request by its internal id.
    """

    def __init__(
        self,
        *,
        request_id: str,
        output_kind: RequestOutputKind,
        source: Source,
        delivery: Delivery,
        abort: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__(output_kind, request_id)
        self._source = source
        self._delivery = delivery
        self._abort = abort
        self._final: Output | None = None  # held back until enrichment has settled
        self._handed_out = False

    @property
    def parent_collector(self) -> RequestOutputCollector | None:
        """VLLM's own collector: read directly, or by the flight; None when a stored answer is."""
        if isinstance(self._source, NativeSource):
            return self._source.parent
        flight = self._source.flight if isinstance(self._source, Reader) else None
        return flight.native if flight is not None else None

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Take an output or error from outside, as the native collector does."""
        if isinstance(self._source, Reader):
            self._source.inject(output)
        elif (parent := self.parent_collector) is not None:
            parent.put(output)

    def get_nowait(self) -> RequestOutput | PoolingRequestOutput | None:
        """Return the next output, or None when there is none yet.

        Raises:
            Exception: What ended the request.
        """
        if not self._handed_out and self._final is None and (better := self._delivery.adopt()):
            self._source.close()
            self._source = better
        if self._final is None:
            output = self._source.get_nowait()
            # Tested by identity in vLLM, so it must pass as it is.
            if output is None or output is STREAM_FINISHED:
                return output
            if not output.finished:
                return self._enhance(output, final=False)
            self._final = output
            self._delivery.arrived()
        if not self._delivery.settled():
            return None
        output, self._final = self._final, None
        return self._enhance(output, final=True)

    async def get(self) -> RequestOutput | PoolingRequestOutput:
        """Wait for the next output and return it.

        Raises:
            Exception: What ended the request.
        """
        while (output := self.get_nowait()) is None:
            await self._wait()
        return output

    async def aiter(self) -> AsyncGenerator[RequestOutput | PoolingRequestOutput, None]:
        """Iterate over the outputs; leaving early aborts the request.

        Yields:
            `EnhancedRequestOutput`, or vLLM's own type for pooling requests.

        Raises:
            Exception: What ended the request.
        """
        finished = False
        try:
            while not finished:
                output = await self.get()
                finished = output.finished
                if output is not STREAM_FINISHED:
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            if not finished:
                await self._abort(self.request_id)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading, and stop what ran for this request alone; idempotent."""
        self._source.close()
        self._delivery.left()
        super().close()

    async def _wait(self) -> None:
        if self._final is not None:
            await self._delivery.settle()
        elif (race := self._delivery.racing()) is None or self._handed_out:
            await self._source.wait()
        else:
            news = asyncio.ensure_future(self._source.wait())
            try:
                await asyncio.wait({news, race}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
                await asyncio.wait([news])  # and not the news: who reads may be cancelled

    def _enhance(self, output: Output, *, final: bool) -> Output:
        if not self._handed_out:
            self._handed_out = True
            self._delivery.handed_out()
        metadata = self._delivery.metadata(final=final)
        if isinstance(output, RequestOutput):
            return EnhancedRequestOutput.of(output, metadata)
        return output
