"""A worker that cannot start says why, once, and by the code that it ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workers.local import LocalStack

# The command, whose engine does not start. vLLM itself would be imported for many seconds.
_FAILS = """
import sys
from contextlib import asynccontextmanager
from schema import errors
from workers import cli, runtime

@asynccontextmanager
async def worker_runtime(*_, **__):
    raise {error}
    yield

runtime.worker_runtime = worker_runtime
sys.exit(cli.main(["worker"]))
"""


def run(error: str, stack: LocalStack) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _FAILS.format(error=error)],
        env={**os.environ, "PROMPTMILL_DATA_DIR": str(stack.data_dir)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("error", "code"), [("errors.ConfigurationError('no')", 2), ("errors.StackError('no')", 3)]
)
def test_a_reason_of_ours_is_one_line(error: str, code: int, stack: LocalStack) -> None:
    """By code 2 `promptmill up` knows that another try would end alike."""
    done = run(error, stack)
    assert done.returncode == code, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("promptmill: ")
    assert "Traceback" not in done.stderr


def test_any_other_is_told_at_length(stack: LocalStack) -> None:
    """A supervisor that starts anew what failed must see that it did."""
    done = run("RuntimeError('the card has fallen off the bus')", stack)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\nRuntimeError: the card has fallen off the bus") == 1, done.stderr
