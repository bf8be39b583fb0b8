"""The process behind `SchemaChecker`: ``-m workers.schema_checker_main PARENT SECONDS BYTES``.

It reads requests as lines of JSON from its standard input, answers each with a line, and ends with
its input or its parent. A check that takes too long ends it by SIGPROF, which needs no help of the
interpreter.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from referencing.exceptions import Unresolvable

from workers.enrich.lifeline import die_with_parent
from workers.json_schemas import fault_in

_MESSAGE_CHARS = 300


def main(parent_pid: int, limit_s: float, memory_bytes: int) -> None:
    """Answer until the input ends.

    Args:
        parent_pid: Who started it.
        limit_s: Seconds of processor time that a request may take.
        memory_bytes: How much it may grow by.
    """
    die_with_parent(parent_pid)
    _bound_memory(memory_bytes)
    # Ignoring or blocking a signal is inherited, and would leave a check without a bound.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        reply = _reply(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"faults": [fault_in(request["schema"], text) for text in request["texts"]]}
    except Unresolvable as exc:
        return {"wrong": f"refers to what is not in it ({_cut(exc)})"}
    except (MemoryError, SystemError):  # CPython may raise either where an allocation fails
        return {"out_of_memory": True}
    except Exception as exc:  # noqa: BLE001  what a schema can make a validator raise has no end
        return {"wrong": f"cannot be checked by ({type(exc).__name__}: {_cut(exc)})"}


def _cut(exc: Exception) -> str:
    return str(exc)[:_MESSAGE_CHARS]  # it may hold all of the schema or of the answer


def _bound_memory(growth: int) -> None:
    """Bound the address space; only Linux says how large it is now."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        bound = pages * resource.getpagesize() + growth
        if most != resource.RLIM_INFINITY:
            bound = min(bound, most)
        resource.setrlimit(resource.RLIMIT_AS, (bound, most))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
