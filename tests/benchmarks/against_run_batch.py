"""Batch files through promptmill, beside vLLM's own ``run_batch`` on the same machine.

    python -m tests.benchmarks.against_run_batch --input FILE --repeats FILE --json

Engine start-up is taken out on both sides: the peer's time runs from its reading the file to its
whole output, ours from the first row read to the last line written, with the worker up. Both serve
the bundled model with the same engine arguments. Three ratios, each our rows a second over the
peer's on the same file: ``cold_ratio`` (nothing seen before), ``repeats_ratio`` (a file in which
prompts repeat), ``cached_ratio`` (everything seen before).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workers.aio_client import AsyncJobClient
from workers.batch import BatchOptions, run_batch
from workers.devices import Device, Fleet
from workers.serving import ServedModel, prepare_environment, served_model
from workers.settings import Settings, load_settings

_TIMEOUT_S = 1800.0


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="rows never seen before")
    parser.add_argument("--repeats", type=Path, help="rows of which some repeat others")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    parser.add_argument("--engine-arg", action="append", default=[], help="for both engines")
    options = parser.parse_args(arguments)
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as folder:
        settings = load_settings(data_dir=Path(folder) / "data")
        model = served_model(settings, engine_args=options.engine_arg)
        peer = {
            name: _peer(path, Path(folder) / f"peer-{name}.jsonl", model)
            for name, path in (("cold", options.input), ("repeats", options.repeats))
            if path is not None
        }
        ours = asyncio.run(_ours(settings, options, Path(folder)))
    figures = _figures(peer, ours)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:28} {value:10.2f}")
    return figures


def _rows(path: Path) -> int:
    return sum(1 for line in path.read_bytes().splitlines() if line.strip())


def _peer(source: Path, target: Path, model: ServedModel) -> float:
    """Run vLLM's own batch runner; return its rows a second."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
    command += ["-i", str(source), "-o", str(target), "--model", model.path]
    command += ["--served-model-name", model.name, *model.engine_args]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    rows, started, end = _rows(source), None, time.monotonic() + _TIMEOUT_S
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "Reading batch from" in line:
                started = time.monotonic()
                break
        if started is None:
            raise RuntimeError("run_batch did not start:\n" + "".join(said[-20:]))
        while not (target.exists() and _rows(target) == rows):
            if time.monotonic() > end or process.poll() not in (None, 0):
                raise RuntimeError("run_batch did not finish")
            time.sleep(0.01)
        return rows / (time.monotonic() - started)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def _ours(settings: Settings, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    rates = {}
    async with AsyncJobClient(settings) as client:
        await client.connection()
        fleet = Fleet(settings, [Device()], engine_args=options.engine_arg)
        fleet.start()
        try:
            await asyncio.to_thread(fleet.wait_ready, _TIMEOUT_S)
            # A namespace each, so that a file's figures do not profit from another's answers.
            passes = [("cold", options.input, "a"), ("cached", options.input, "a")]
            if options.repeats is not None:
                passes.append(("repeats", options.repeats, "b"))
            for name, path, namespace in passes:
                summary = await run_batch(
                    client,
                    str(path),
                    str(folder / f"ours-{name}.jsonl"),
                    BatchOptions(namespace=namespace),
                )
                if summary.failed:
                    raise RuntimeError(f"{summary.failed} rows of {path} failed")
                rates[name] = summary.written / summary.elapsed_s
        finally:
            await asyncio.to_thread(fleet.stop)
    return rates


def _figures(peer: dict[str, float], ours: dict[str, float]) -> dict[str, Any]:
    figures = {
        "cold_ratio": ours["cold"] / peer["cold"],
        "cached_ratio": ours["cached"] / peer["cold"],
    }
    if "repeats" in ours:
        figures["repeats_ratio"] = ours["repeats"] / peer["repeats"]
    figures |= {f"peer_{name}_rows_per_s": rate for name, rate in peer.items()}
    figures |= {f"our_{name}_rows_per_s": rate for name, rate in ours.items()}
    return {name: round(value, 4) for name, value in figures.items()}


if __name__ == "__main__":
    main()
