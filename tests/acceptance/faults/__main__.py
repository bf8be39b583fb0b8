"""``python -m tests.acceptance.faults --minutes 30``: faults for long, and a table of them."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.acceptance.faults import harness

_SHOWN = 20


def main() -> int:
    """Run; return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="empty folder for data and logs")
    options = parser.parse_args()
    seed = options.seed
    if seed is None:
        seed = int(os.environ.get("PROMPTMILL_FAULT_SEED") or random.randrange(2**32))  # noqa: S311  no secret
    with tempfile.TemporaryDirectory(prefix="promptmill-faults-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # the servers' own user passes through it
        report = asyncio.run(harness.run(folder, seed=seed, seconds=60 * options.minutes))
    print(report.table())
    for line in report.verdict.wrong[:_SHOWN]:
        print(line)
    return 1 if report.verdict.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
