"""Shows, on a machine with NVIDIA cards, that each worker holds memory on its own cards only.

``python tools/prove_pinning.py --gpus 0:1 [--model M]`` starts workers as ``promptmill up`` does,
waits until they take jobs, asks the driver which process holds memory on which card, and compares.
It exits with 0 when every worker keeps to its cards and uses each of them.

Written with no card at hand: its reckoning is tested, the whole of it was never run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence

import psutil

from workers import hardware
from workers.devices import Fleet, fetch_models
from workers.endpoints import find
from workers.fleet_plan import on_this_machine, plan
from workers.settings import load_settings


def holders() -> dict[int, set[str]]:
    """Return the UUIDs of cards on which each process holds memory, as the driver says."""
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    found: dict[int, set[str]] = {}
    for line in subprocess.run(
        query, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        pid, uuid = (word.strip() for word in line.split(","))
        found.setdefault(int(pid), set()).add(uuid)
    return found


def faults(
    wanted: Mapping[str, set[str]],
    families: Mapping[str, set[int]],
    held: Mapping[int, set[str]],
) -> list[str]:
    """Compare what each worker was given with what its processes hold.

    Args:
        wanted: UUIDs of cards, by worker.
        families: Numbers of its processes, by worker.
        held: UUIDs of cards, by process.

    Returns:
        One sentence for each worker that strayed or left a card unused.
    """
    found = []
    for worker, cards in wanted.items():
        used = set().union(*(held.get(pid, set()) for pid in families[worker]))
        if strayed := used - cards:
            found.append(f"{worker} holds memory on {', '.join(sorted(strayed))}, not its own")
        if idle := cards - used:
            found.append(f"{worker} holds none on {', '.join(sorted(idle))}, which is its own")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Start, compare, stop.

    Args:
        arguments: Of the command line; None reads the process' own.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", required=True, help="as promptmill up takes it, such as 0:1")
    parser.add_argument("--model", help="default: the bundled one")
    options = parser.parse_args(arguments)
    cards = hardware.gpus()
    if not cards:
        print("there is no NVIDIA card here, so nothing can be shown", file=sys.stderr)
        return 2
    settings = load_settings(model=options.model)
    posts = on_this_machine(plan(gpus=options.gpus), cards)
    fetch_models(settings, posts, on_event=print)
    stack, fleet = find(settings), Fleet(settings, posts, on_event=print)
    try:
        fleet.start()
        fleet.wait_ready()
        families = {
            worker.name: {
                worker.process.pid,
                *(one.pid for one in psutil.Process(worker.process.pid).children(recursive=True)),
            }
            for worker in fleet.workers
            if worker.process is not None
        }
        wanted = {
            post.name: {
                card.uuid for card in cards for name in post.device.gpus if card.answers_to(name)
            }
            for post in posts
        }
        found = faults(wanted, families, holders())
    finally:
        fleet.stop()
        stack.close()
    print("\n".join(found) or f"{len(wanted)} workers keep to their own cards, and use them all")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
