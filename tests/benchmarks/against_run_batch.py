"""Batch files through promptmill, beside vLLM's own ``run_batch`` on the same machine.

    python -m tests.benchmarks.against_run_batch --input FILE --repeats FILE --json

Engine start-up is taken out on both sides: the peer's time runs from its reading the file to its
whole output, ours from the first row read to the last line written, with the worker up. Both serve
the bundled model with the same engine arguments. Three ratios, each our rows a second over the
peer's on the same file: ``cold_ratio`` (nothing seen before), ``repeats_ratio`` (a file in which
prompts repeat), ``cached_ratio`` (everything seen before). Without files of one's own the
benchmark makes some. Words go to standard error, figures alone to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import chat_rows
from tests.benchmarks.figures import Figure, words_on_stderr
from tests.benchmarks.run_batch_peer import PeerRun, answered, peer_run
from workers.aio_client import AsyncJobClient
from workers.batch import BatchOptions, run_batch
from workers.devices import Device, Fleet
from workers.serving import prepare_environment, served_model
from workers.settings import Settings, load_settings

_START_S = 1200.0
#: The cached pass takes a blink, so it is taken several times and the median counts.
_CACHED_PASSES = 5
#: Before each pass: vLLM's processes keep looking for work for a second after their last step.
_REST_S = 1.5


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measure, print, and return the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, help="rows never seen before")
    parser.add_argument("--repeats", type=Path, help="rows of which some repeat others")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument("--rows", type=int, default=128, help="of files made here")
    parser.add_argument("--engine-arg", action="append", default=[], help="for both engines")
    options = parser.parse_args(arguments)
    for path in (options.input, options.repeats):
        if path is not None and not path.is_file():
            parser.error(f"{path} is no file")
    with words_on_stderr(), tempfile.TemporaryDirectory(prefix="promptmill-bench-") as folder:
        cold, repeats = options.input, options.repeats
        if cold is None:
            made = chat_rows.write_files(Path(folder), rows=options.rows)
            cold, repeats = made[0], repeats or made[1]
        found = measure(cold, repeats, engine_args=options.engine_arg)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:28} {value:10.2f}")
    return found


def figures(*, quick: bool) -> list[Figure]:
    """Measure on files made here.

    Args:
        quick: A quarter of the rows.
    """
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as folder:
        cold, repeats = chat_rows.write_files(Path(folder), rows=32 if quick else 128)
        found = measure(cold, repeats)
    targets = {"cold": 0.95, "repeats": 1.25, "cached": 50.0}
    peers = {"cold": "cold", "repeats": "repeats", "cached": "cold"}
    ratios = [
        Figure(
            name=f"{name}_ratio",
            value=found[f"{name}_ratio"],
            at_least=target,
            comparison=f"run_batch: {found[f'peer_{peers[name]}_rows_per_s']:.1f} rows/s",
        )
        for name, target in targets.items()
    ]
    rates = [
        Figure(name=name, value=value, unit="rows/s")
        for name, value in found.items()
        if name.startswith("our_")
    ]
    return ratios + rates


def measure(
    cold: Path, repeats: Path | None, *, engine_args: Sequence[str] = ()
) -> dict[str, float]:
    """Run both sides over both files.

    The peer's two runs stand before and after ours, so that a machine whose speed changes
    meanwhile favours nobody.

    Args:
        cold: Rows never seen before.
        repeats: Rows of which some repeat others; None leaves that ratio out.
        engine_args: Of vLLM's command line, for both.

    Returns:
        Ratios and rates by name.

    Raises:
        RuntimeError: A side did not start, did not finish, or failed on rows that the other
            answered.
    """
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as name:
        folder = Path(name)
        # The embedded servers may run as another user.
        folder.chmod(0o755)
        settings = load_settings(data_dir=folder / "data")
        model = served_model(settings, engine_args=engine_args)
        peer = {"cold": peer_run(cold, folder / "peer-cold.jsonl", model)}
        ours = asyncio.run(_ours(settings, cold, repeats, engine_args, folder))
        if repeats is not None:
            peer["repeats"] = peer_run(repeats, folder / "peer-repeats.jsonl", model)
    return _compared(peer, ours)


async def _ours(
    settings: Settings,
    cold: Path,
    repeats: Path | None,
    engine_args: Sequence[str],
    folder: Path,
) -> dict[str, PeerRun]:
    runs: dict[str, PeerRun] = {}
    async with AsyncJobClient(settings) as client:
        await client.connection()
        fleet = Fleet(settings, [Device()], engine_args=engine_args, on_event=_say)
        started = time.monotonic()
        _say("starting a worker of promptmill")
        fleet.start()
        try:
            await asyncio.to_thread(fleet.wait_ready, _START_S)
            _say(f"it takes jobs after {time.monotonic() - started:.0f} s")
            # A namespace each, so that a file's figures do not profit from another's answers.
            runs["cold"] = await _pass(client, "cold", cold, folder, "a")
            if repeats is not None:
                runs["repeats"] = await _pass(client, "repeats", repeats, folder, "b")
            cached = [
                await _pass(client, f"cached-{number}", cold, folder, "a")
                for number in range(_CACHED_PASSES)
            ]
            runs["cached"] = sorted(cached, key=lambda run: run.seconds)[_CACHED_PASSES // 2]
        finally:
            await asyncio.to_thread(fleet.stop)
    return runs


async def _pass(
    client: AsyncJobClient, name: str, source: Path, folder: Path, namespace: str
) -> PeerRun:
    target = folder / f"ours-{name}.jsonl"
    await asyncio.sleep(_REST_S)
    summary = await run_batch(client, str(source), str(target), BatchOptions(namespace=namespace))
    run = PeerRun(rows=summary.written, seconds=summary.elapsed_s, answered=answered(target))
    _say(f"promptmill, {name}: {run.rows} rows in {run.seconds:.2f} s")
    return run


def _compared(peer: dict[str, PeerRun], ours: dict[str, PeerRun]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, run in ours.items():
        other = peer["cold" if name == "cached" else name]
        if (run.rows, run.answered) != (other.rows, other.answered):
            msg = (
                f"{name}: of {other.rows} rows run_batch answered {other.answered}, "
                f"promptmill {run.answered} of {run.rows}; their speeds cannot be compared"
            )
            raise RuntimeError(msg)
        found[f"{name}_ratio"] = run.rate / other.rate
    found |= {f"peer_{name}_rows_per_s": run.rate for name, run in peer.items()}
    found |= {f"our_{name}_rows_per_s": run.rate for name, run in ours.items()}
    return {name: round(value, 4) for name, value in found.items()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
