"""What metrics and tracing cost in throughput: two workers, one with and one without, by turns.

    python -m tests.benchmarks.sight

Each worker has an embedded stack of its own and the real engine. One exports nothing, and its vLLM
keeps no statistics: that is ``off``. The other keeps vLLM's statistics and is told of a collector,
which throws spans away. It has two kinds of rounds: ``on``, in which every job is traced, vLLM's
own spans too, and the worker is scraped three times as often as the configuration that is shipped
asks for; and ``silent``, in which nobody scrapes and no submission was sampled. Scraper and
collector run on the same cores. Rounds alternate, so that what the machine does meanwhile hits all
sides. Jobs are counted on every side, as ``promptmill top`` shows them without any exporter.

New jobs are answered by the model; these are what a deployment spends its time on. How many are
done in a second differs from round to round by more than the cost that is looked for, so the
processor time of the worker's main process is compared as well: all that is done for metrics and
traces is done there, and what it takes of cores that are all busy is missing elsewhere.

Jobs from the cache are so cheap that their own spans cost more than they do: with ``sampled`` every
job is traced, with ``unsampled`` the submission was not sampled, as nearly all are where a sampler
is set.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler, SamplingResult

from tests.benchmarks import cached_jobs, chat_rows
from tests.benchmarks.cached_jobs import Reader, Spent
from tests.benchmarks.deployed import Deployed, deployed, say
from tests.benchmarks.figures import Figure, alone

TOKENS = 32
_SCRAPE_S = 5.0
_ARGUMENTS = ("--enforce-eager", "--max-model-len", "1024")
_COLLECTOR = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    rounds: int  # pairs
    new: int  # jobs a round that the model answers
    cached: int  # jobs a round from the cache


@dataclass
class Side:
    """What one way of running gave, round by round."""

    rates: list[float] = field(default_factory=list)  # jobs a second
    spent: Counter[str] = field(default_factory=Counter)  # seconds of the processor, by part
    jobs: int = 0

    @property
    def worker_us(self) -> float:
        """Microseconds of the processor that a job takes in the worker's main process."""
        return self.spent["worker"] / self.jobs * 1e6

    @property
    def all_us(self) -> float:
        """The same of all parts together."""
        return sum(self.spent.values()) / self.jobs * 1e6

    def add(self, spent: Spent, jobs: int) -> None:
        """Take in a round."""
        self.rates.append(jobs / spent.seconds)
        self.spent.update(spent.by_part)
        self.jobs += jobs


class Switch(Sampler):
    """Samples all or nothing, as it is told."""

    def __init__(self) -> None:
        self.on = True

    def should_sample(self, *args: Any, **words: Any) -> SamplingResult:
        """Decide for a submission; what belongs to it follows."""
        return (ALWAYS_ON if self.on else ALWAYS_OFF).should_sample(*args, **words)

    def get_description(self) -> str:
        """Name it."""
        return "switch"


def figures(*, quick: bool) -> list[Figure]:
    """Measure both sides in turns.

    Args:
        quick: Fewer rounds, of fewer jobs.
    """
    full = Size(rounds=6, new=128, cached=10_000)
    return asyncio.run(_measure(Size(rounds=2, new=32, cached=2_000) if quick else full))


async def _measure(size: Size) -> list[Figure]:
    silent: dict[str, Any] = {"metrics_port": 0}
    words = (*_ARGUMENTS, "--disable-log-stats")
    switch = Switch()
    with _collector() as url:
        # The silent side first: its client must find no tracer in this process.
        async with deployed(engine_args=words, **silent) as off:
            _trace(url, switch)
            async with deployed(engine_args=_ARGUMENTS, otlp_endpoint=url) as on:
                new = await _new(off, on, switch, size)
                cached = await _cached(off, on, switch, size)
    return [*_compared("new", new, at_most=2.0), *_compared("cached", cached, at_most=None)]


async def _new(off: Deployed, on: Deployed, switch: Switch, size: Size) -> dict[str, Side]:
    questions, sides = chat_rows.questions(), {"off": Side(), "silent": Side(), "on": Side()}
    for number in range(-1, size.rounds):
        for name in _turn(tuple(sides), number):
            asked = [_new_job(next(questions)) for _ in range(size.new)]
            switch.on = name == "on"
            system = off if name == "off" else on
            async with _scraped(on) if name == "on" else nullcontext():
                spent = await _round(system, asked, f"{name}-new-{number}")
            if number >= 0:  # the one before is to warm up
                sides[name].add(spent, len(asked))
    return sides


async def _cached(off: Deployed, on: Deployed, switch: Switch, size: Size) -> dict[str, Side]:
    sides = {"off": Side(), "unsampled": Side(), "sampled": Side()}
    asked = [cached_jobs.request("prompt", number) for number in range(cached_jobs.DISTINCT)]
    for system in (off, on):
        for time in range(2):
            await _round(system, asked, f"warm-{time}")
    jobs = list(itertools.islice(itertools.cycle(asked), size.cached))
    for number in range(-1, size.rounds):
        for name in _turn(tuple(sides), number):
            switch.on = name == "sampled"
            system = off if name == "off" else on
            async with _scraped(on) if name != "off" else nullcontext():
                spent = await _round(system, jobs, f"{name}-cached-{number}")
            if number >= 0:
                sides[name].add(spent, len(jobs))
    return sides


async def _round(system: Deployed, asked: Sequence[dict[str, Any]], channel: str) -> Spent:
    """Submit jobs and read their results."""
    spent, reader = Spent(), Reader(system, channel)
    with spent.on(system):
        await asyncio.gather(
            system.client.submit_many(asked, channel=channel), reader.read(len(asked))
        )
    say(f"{channel}: {len(asked) / spent.seconds:.1f} jobs/s")
    return spent


def _new_job(question: str) -> dict[str, Any]:
    return {"prompt": question, "sampling": {"max_tokens": TOKENS, "ignore_eos": True}}


def _turn(names: Sequence[str], number: int) -> Sequence[str]:
    """Return the order of a round, so that none is always first."""
    at = number % len(names)
    return (*names[at:], *names[:at])


def _compared(kind: str, sides: dict[str, Side], *, at_most: float | None) -> Iterator[Figure]:
    """Compare each side with the first, which has neither metrics nor tracing.

    Args:
        kind: Of jobs.
        sides: By name.
        at_most: Percent that the last side may take of all processor time.
    """
    off, *_, last = sides
    for name, side in sides.items():
        yield Figure(
            name=f"{kind}.{name}_per_s",
            value=statistics.median(side.rates),
            unit="jobs/s",
            comparison=f"{len(side.rates)} rounds, {min(side.rates):.4g} to {max(side.rates):.4g}",
        )
        yield Figure(
            name=f"{kind}.{name}_processor_us",
            value=side.worker_us,
            unit="µs",
            comparison=f"a job, in the worker's main process; in all parts {side.all_us:,.0f}",
        )
    base = sides.pop(off)
    for name, side in sides.items():
        costs = [100 * (1 - a / b) for a, b in zip(side.rates, base.rates, strict=True)]
        low, _, high = statistics.quantiles(costs, n=4)
        yield Figure(
            name=f"{kind}.{name}_slower_percent",
            value=statistics.median(costs),
            unit="%",
            comparison=f"than {off}; half of the pairs of rounds from {low:.1f} to {high:.1f}",
        )
        yield Figure(
            name=f"{kind}.{name}_cost_percent",
            value=100 * (side.worker_us - base.worker_us) / base.all_us,
            unit="%",
            at_most=at_most if name == last else None,
            comparison="more processor time in the worker, of all that a job takes",
        )


def _trace(url: str, switch: Switch) -> None:
    """Let clients of this process trace from now on, as far as the switch says."""
    provider = TracerProvider(sampler=switch)
    exporter = OTLPSpanExporter(endpoint=f"{url}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


@contextmanager
def _collector() -> Iterator[str]:
    """Take spans and throw them away, in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", _COLLECTOR], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait(30)


@asynccontextmanager
async def _scraped(system: Deployed) -> AsyncIterator[None]:
    """Read the worker's metrics every few seconds."""
    address = f"http://127.0.0.1:{system.settings.metrics_port}/metrics"

    def scrape() -> None:
        with urllib.request.urlopen(address, timeout=60) as answer:
            answer.read()

    async def scraping() -> None:
        while True:
            await asyncio.to_thread(scrape)
            await asyncio.sleep(_SCRAPE_S)

    task = asyncio.create_task(scraping(), name="scraping")
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


if __name__ == "__main__":
    alone(figures, __doc__)
