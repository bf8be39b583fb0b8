"""The process behind `SchemaChecker`: ``python -m workers.schema_checker_main LIMIT_S``.

It reads requests as lines of JSON from its standard input, answers each with a line, and ends with
its input. A check over the limit ends it by SIGPROF, which needs no help of the interpreter.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from referencing.exceptions import Unresolvable

from workers.json_schemas import fault_in


def main(limit_s: float) -> None:
    """Answer until the input ends.

    Args:
        limit_s: Seconds of processor time that a request may take.
    """
    # Ctrl-C and a supervisor's SIGTERM reach the whole group; the parent still drains then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        reply = _reply(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"faults": [fault_in(request["schema"], text) for text in request["texts"]]}
    except Unresolvable as exc:
        return {"unresolvable": str(exc)}


if __name__ == "__main__":
    main(float(sys.argv[1]))
