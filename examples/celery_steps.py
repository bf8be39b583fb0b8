"""Promptmill's task as a step in the canvas of a Celery application of your own.

    export PROMPTMILL_REDIS_URL=redis://…
    celery --workdir examples -A celery_steps worker --queues reports --pool solo
    python examples/celery_steps.py review-7 "Is it good?" "Is it new?" "Is it true?"

Each part of the questions is a chain: promptmill's workers answer them, and when all of the part
are answered a worker of this application goes on with what came of them. The parts are a group.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import redis
from celery import Celery, chain, group

REDIS_URL = os.environ.get("PROMPTMILL_REDIS_URL", "redis://localhost:6379/0")
MODEL = os.environ.get("PROMPTMILL_SERVED_MODEL_NAME", "smollm2-135m-instruct")
NAMESPACE = os.environ.get("PROMPTMILL_NAMESPACE", "default")

# Celery has a name of its own for sockets.
app = Celery("steps", broker=REDIS_URL.replace("unix://", "redis+socket://"))
app.conf.task_ignore_result = True
# Both applications have to name the lists of a queue's priorities alike.
app.conf.broker_transport_options = {"priority_steps": list(range(10)), "sep": "\x06\x16"}


def ask(prompts: Sequence[str], channel: str) -> Any:
    """Return the step that answers prompts; their results go to the channel.

    Args:
        prompts: What is asked.
        channel: Result channel.
    """
    jobs = [
        {
            "id": str(uuid4()),
            "channel": channel,
            "request": {"kind": "prompt", "prompt": prompt, "sampling": {"max_tokens": 32}},
        }
        for prompt in prompts
    ]
    message = {"v": 1, "namespace": NAMESPACE, "sent_at": time.time(), "jobs": jobs}
    return app.signature(
        "promptmill.run_jobs",
        queue=f"promptmill.{MODEL}",
        priority=5,
        immutable=True,
        headers={"promptmill": message},
    )


@app.task(name="steps.report")
def report(channel: str) -> None:
    """Go on with the answers of one part: here, count them where others can see it."""
    connection = redis.Redis.from_url(REDIS_URL)
    entries = connection.xrange(f"results:{NAMESPACE}:{channel}")
    results = [json.loads(fields[b"result"]) for _, fields in entries]
    answers = [result["text"] for result in results if result["status"] == "done"]
    connection.set(f"report:{channel}", json.dumps({"answers": answers}), ex=3600)


def main(name: str, *prompts: str) -> None:
    """Ask in parts of two."""
    parts = [prompts[at : at + 2] for at in range(0, len(prompts), 2)]
    steps = (
        chain(ask(part, f"{name}-{number}"), report.si(f"{name}-{number}").set(queue="reports"))
        for number, part in enumerate(parts)
    )
    group(steps).apply_async()


if __name__ == "__main__":
    main(*sys.argv[1:])
