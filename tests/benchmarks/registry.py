"""Which benchmarks there are.

To add one, write ``tests/benchmarks/NAME.py`` with a function ``figures(*, quick: bool)`` that
returns `tests.benchmarks.figures.Figure` values, end it with
``if __name__ == "__main__": alone(figures, __doc__)``, and name it here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One module of this package."""

    name: str
    about: str  # what it answers, in a few words
    most_s: float = 1800.0  # seconds after which it is given up
    by_name: bool = False  # only run when named: it needs a registry, or takes long


BENCHMARKS = (
    Benchmark(name="engine", about="the enhanced engine beside plain AsyncLLM"),
    Benchmark(name="similarity", about="look-ups and hits by meaning among 100,000 answers"),
    Benchmark(
        name="reuse",
        about="how often reuse by meaning is right (needs files of questions)",
        by_name=True,
    ),
    Benchmark(
        name="against_gptcache",
        about="a guarded hit beside GPTCache's (needs a registry)",
        by_name=True,
    ),
    Benchmark(
        name="million",
        about="look-ups among a million made-up vectors",
        most_s=7200.0,
        by_name=True,
    ),
    Benchmark(name="cached_jobs", about="jobs from the cache, through the whole queue"),
    Benchmark(name="fair_release", about="a backlog of one namespace, let in by turns or at once"),
    Benchmark(name="more_workers", about="jobs from the cache, by two workers beside one"),
    Benchmark(name="sight", about="throughput with metrics and tracing, beside without"),
    Benchmark(name="sizes", about="cost against rows and against stored answers (a stand-in)"),
    Benchmark(name="start_up", about="`up` until it is ready, beside vLLM's own start"),
    Benchmark(name="ceilings", about="what a job costs the servers that all workers share"),
    Benchmark(name="against_run_batch", about="batch files beside vLLM's own run_batch"),
    Benchmark(
        name="batch_memory",
        about="memory of a batch run of a million rows",
        most_s=3600.0,
    ),
    Benchmark(name="prefix_order", about="rows that begin alike next to each other, or as read"),
)
