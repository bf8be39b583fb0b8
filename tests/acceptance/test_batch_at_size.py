"""Batch runs through a worker process: memory with many rows, and what the order of rows does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.benchmarks import batch_memory, prefix_order
from workers.aio_client import AsyncJobClient
from workers.batch import BatchOptions, run_batch
from workers.local import LocalStack
from workers.store.schema_upgrade import upgrade

ROWS = 3_000


async def test_memory_does_not_grow_with_the_file(stack: LocalStack, tmp_path: Path) -> None:
    upgrade(stack.database_url)
    found = await batch_memory.measure(tmp_path, stack, rows=ROWS)
    assert found.client_peak < 300 * batch_memory.MB
    assert found.worker_growth < 60 * batch_memory.MB
    with (tmp_path / "rows.out.jsonl").open("rb") as out:
        assert len({json.loads(line)["custom_id"] for line in out}) == ROWS


async def test_both_orders_answer_every_row(client: AsyncJobClient, tmp_path: Path) -> None:
    found = await prefix_order.compare(client, tmp_path, documents=2, questions=2)
    assert {figure.name for figure in found} > {"grouping_gain", "prefix_share_grouped"}
    names = [str(row["custom_id"]) for row in prefix_order.rows(2, 2)]
    for order in ("as-read", "grouped"):
        lines = (tmp_path / f"{order}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["custom_id"] for line in lines) == sorted(names)


@pytest.mark.parametrize("fits", [True, False])
async def test_rows_that_must_fit_a_schema(
    client: AsyncJobClient, tmp_path: Path, fits: bool
) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
    }
    schema["additionalProperties"] = False
    body = {
        "messages": [{"role": "user", "content": "Is it so?"}],
        "temperature": 0,
        "max_tokens": 60 if fits else 2,
    }
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    summary = await run_batch(
        client,
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        BatchOptions(schema=schema, namespace=f"n{uuid4().hex[:8]}"),
    )
    line = json.loads((tmp_path / "out.jsonl").read_text())
    if fits:
        content = line["response"]["body"]["choices"][0]["message"]["content"]
        assert isinstance(json.loads(content)["yes"], bool)
        assert line["promptmill"]["tokens"]["completion_tokens"] > 0
        assert summary.failed == 0
    else:
        assert line["response"]["status_code"] == 422
        assert "does not fit the schema" in line["error"]["message"]
        assert summary.failed == 1
