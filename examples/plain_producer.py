"""Ask promptmill without any of its code: a Redis client and JSON are all it takes.

    python examples/plain_producer.py "The capital of France is"

`docs/wire-format.md` says what each field means. A producer in another language does the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any
from uuid import uuid4

import redis

REDIS_URL = os.environ.get("PROMPTMILL_REDIS_URL", "redis://localhost:6379/0")
MODEL = os.environ.get("PROMPTMILL_SERVED_MODEL_NAME", "smollm2-135m-instruct")
NAMESPACE, PRIORITY = os.environ.get("PROMPTMILL_NAMESPACE", "default"), 5
NOTHING = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def message(jobs: list[dict[str, Any]]) -> bytes:
    """Return the item of the queue that asks for some jobs."""
    task_id = str(uuid4())
    header = {"v": 1, "namespace": NAMESPACE, "sent_at": time.time(), "jobs": jobs}
    return json.dumps(
        {
            "body": json.dumps([[], {}, NOTHING]),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": "promptmill.run_jobs",
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": "()",
                "kwargsrepr": "{}",
                "ignore_result": True,
                "promptmill": header,
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": f"promptmill.{MODEL}"},
                "priority": PRIORITY,
                "delivery_tag": str(uuid4()),
            },
        }
    ).encode()


def main(prompt: str) -> None:
    """Ask, wait, print the answer."""
    connection = redis.Redis.from_url(REDIS_URL)
    channel = f"plain-{uuid4().hex}"  # of this program alone, so that no result is another's
    job = {
        "id": str(uuid4()),
        "channel": channel,
        "request": {"kind": "prompt", "prompt": prompt, "sampling": {"max_tokens": 32}},
    }
    connection.lpush(f"promptmill.{MODEL}\x06\x16{PRIORITY}", message([job]))
    found: Any = []
    while not found:
        found = connection.xread({f"results:{NAMESPACE}:{channel}": "0"}, block=5000)
    ((_, fields),) = found[0][1]
    result = json.loads(fields[b"result"])
    print(result["text"] if result["status"] == "done" else result["error"]["message"])


if __name__ == "__main__":
    main(*sys.argv[1:])
