"""Post every result of a channel to a web address, again and again until it was taken.

    python examples/webhook.py CHANNEL https://example.org/answers

A result is acknowledged only after the address has answered with success, so a death between the
two posts it once more. The header Idempotency-Key tells the receiver that it is the same.
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request

from workers import JobClient

MOST_WAIT_S = 60.0


def post(url: str, key: str, body: str) -> None:
    """Post one result; return when it was taken.

    Args:
        url: The address.
        key: The same for every repeat.
        body: The result as JSON.
    """
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    wait_s = 0.5
    while True:
        request = urllib.request.Request(url, body.encode(), headers)  # noqa: S310  the user's own
        try:
            with urllib.request.urlopen(request, timeout=30):  # noqa: S310
                return
        except (urllib.error.URLError, TimeoutError) as exc:
            print(f"{key}: {exc}; again in {wait_s:g} s", file=sys.stderr)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, MOST_WAIT_S)


def main(channel: str, url: str) -> None:
    """Run until interrupted."""
    with JobClient.from_settings() as client:
        results = client.results(channel, group="webhook", consumer="webhook-1")
        for delivery in results:
            result = delivery.result
            post(url, f"{result.job_id}:{result.token}", result.model_dump_json())
            results.ack(delivery)


if __name__ == "__main__":
    main(*sys.argv[1:])
