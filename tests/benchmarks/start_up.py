"""How long `promptmill up` takes until it says ``ready``, beside vLLM's own start.

Both start as processes of their own, one after the other, with the same model and arguments; vLLM's
side imports it and makes an `AsyncLLM`. `up` starts servers, tables, Celery, spaCy and the embedder
beside the engine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from tests.benchmarks.figures import Figure, alone
from workers.local import bundled_model

ARGUMENTS = ("--max-model-len", "4096", "--enforce-eager")
READY = "ready"
_MOST_S = 600.0
_PLAIN = """
import sys
from vllm import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
if __name__ == "__main__":
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parser.parse_args()))
    print("ready", flush=True)
    sys.stdin.read()
    engine.shutdown()
"""


def until_ready(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Start a process, and end it when it says that it is ready.

    Args:
        command: What to start.
        environment: All of it.

    Returns:
        Seconds from the start of the process until it said so.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout or ():
            if line.strip() == READY:
                return time.perf_counter() - started
        raise RuntimeError(f"it ended with {process.wait()} and was never ready: {command}")
    finally:
        if process.stdin is not None:
            process.stdin.close()  # ends vLLM's side
        if command[1] == "-m":
            process.send_signal(signal.SIGINT)
        try:
            process.wait(_MOST_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def figures(*, quick: bool) -> Sequence[Figure]:
    """Measure both sides in turns.

    Args:
        quick: Once each; else three times, of which the quickest counts.
    """
    model = str(bundled_model())
    plain = [sys.executable, "-c", _PLAIN, "--model", model, *ARGUMENTS]
    ours = [sys.executable, "-m", "workers.cli", "up", "--model", model]
    ours += [f"--vllm-arg={word}" for word in ARGUMENTS]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    theirs_s, first_s, again_s = [], [], []
    for _ in range(1 if quick else 3):
        with tempfile.TemporaryDirectory() as folder:
            at = {**environment, "PROMPTMILL_DATA_DIR": folder}
            theirs_s.append(until_ready(plain, environment))
            first_s.append(until_ready(ours, at))
            again_s.append(until_ready(ours, at))
    theirs = min(theirs_s)
    beside = f"vLLM's own {theirs:.1f} s"
    return [
        Figure(name="vllm_s", value=theirs, unit="s"),
        Figure(name="up_first_s", value=min(first_s), unit="s", comparison="makes its database"),
        Figure(name="up_again_s", value=min(again_s), unit="s", comparison="finds its database"),
        Figure(
            name="more_than_vllm_s",
            value=max(0.0, min(again_s) - theirs),
            unit="s",
            at_most=15.0,
            comparison=beside,
        ),
    ]


if __name__ == "__main__":
    alone(figures, __doc__)
