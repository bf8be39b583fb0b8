"""Parquet files and frames through a batch run; the worker is played by the job store."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from psycopg.rows import dict_row

from schema.errors import InvalidFileError, InvalidRequestError
from tests.integration.test_batch import PlayedWorker, client, row, run, settings, worker, write
from workers import AsyncJobClient, JobClient, Settings
from workers.frames import map_frame

if TYPE_CHECKING:
    from workers.local import LocalStack

__all__ = ["client", "settings", "worker"]


@pytest.fixture(autouse=True)
def _answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the played worker answer with what it was asked, in capitals."""

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        if "input" in body:
            return {"data": [{"embedding": [float(len(body["input"])), 0.5]}]}
        text = body["messages"][-1]["content"].upper()
        choice = {"message": {"content": text}, "finish_reason": body.get("end", "stop")}
        usage = {"prompt_tokens": 5, "completion_tokens": len(text.split())}
        return {"choices": [choice], "usage": usage}

    monkeypatch.setattr(PlayedWorker, "reply", staticmethod(reply))


async def test_parquet_in_and_out(client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path):
    table = pa.table(
        {
            "custom_id": ["a", None, "c"],
            "prompt": ["one", "two", "three"],
            "system": ["Be brief.", None, None],
            "max_tokens": [5, None, 7],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    summary = await run(client, str(tmp_path / "in.parquet"), tmp_path / "out.parquet")
    assert summary.failed == 0
    found = {
        item["custom_id"]: item for item in pq.read_table(tmp_path / "out.parquet").to_pylist()
    }
    assert {name: item["answer"] for name, item in found.items()} == {
        "a": "ONE",
        "row-2": "TWO",
        "c": "THREE",
    }
    assert found["a"]["completion_tokens"] == 1
    assert found["a"]["provenance"] == "generated"
    assert json.loads(found["a"]["line"])["response"]["status_code"] == 200
    asked = await client.request(found["a"]["job_id"])
    assert asked["body"] == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
        ],
        "max_tokens": 5,
    }
    # It is resumed and redone as any other output is.
    worker.ran.clear()
    again = await run(client, str(tmp_path / "in.parquet"), tmp_path / "out.parquet", resume=True)
    assert (again.kept, again.written, worker.ran) == (3, 0, [])


async def test_whole_requests_in_parquet(
    client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path
):
    bodies: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "one"}], "end": None}]
    bodies += [{"messages": [{"role": "user", "content": "two"}], "end": "length"}]
    requests = {
        "custom_id": ["a", "b"],
        "method": ["POST"] * 2,
        "url": ["/v1/chat/completions"] * 2,
    }
    pq.write_table(pa.table({**requests, "body": bodies}), tmp_path / "struct.parquet")
    texts = [json.dumps(bodies[1]), "no object"]
    pq.write_table(pa.table({**requests, "body": texts}), tmp_path / "text.parquet")
    await run(client, str(tmp_path / "struct.parquet"), tmp_path / "out.parquet", ordered=True)
    first, second = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [first["finish_reason"], second["finish_reason"]] == ["stop", "length"]
    await run(client, str(tmp_path / "text.parquet"), tmp_path / "out.parquet", ordered=True)
    fine, wrong = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert fine["answer"] == "TWO"
    assert wrong["error"] == "line 2: body must be an object, not 'no object'"


async def test_parquet_as_tables_are(client: AsyncJobClient, worker: PlayedWorker, tmp_path: Path):
    table = pa.table(
        {
            "custom_id": pa.array([7, 8, 9, 10, 11], "int64"),
            "prompt": pa.array([b"one", None, b"\xff", b" ", b"vector"], "binary"),
            "url": [None, None, None, None, "/v1/embeddings"],
            "max_tokens": [5.0, float("nan"), None, None, None],
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    await run(client, str(tmp_path / "in.parquet"), tmp_path / "out.parquet", ordered=True)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [item["custom_id"] for item in found] == ["7", "8", "9", "10", "11"]
    assert found[0]["answer"] == "ONE"
    assert [item["error"] for item in found[1:4]] == [
        "line 2: body must be an object, not 'an empty prompt'",
        "line 3: body must be an object, not 'bytes that are not UTF-8'",
        "line 4: body must be an object, not 'an empty prompt'",
    ]
    assert (await client.request(found[4]["job_id"]))["body"] == {"input": "vector"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b"PAR1 and no more"), "broke off"),
        (lambda path: pq.write_table(pa.table({"x": [1]}), path), "has no column body, prompt"),
        (
            lambda path: pq.write_table(pa.table({"prompt": pa.array([], "string")}), path),
            "is empty",
        ),
    ],
)
async def test_a_parquet_file_of_another_kind_is_refused(
    client: AsyncJobClient, tmp_path: Path, make: Any, says: str
):
    make(tmp_path / "in.parquet")
    with pytest.raises(InvalidFileError, match=says):
        await run(client, str(tmp_path / "in.parquet"), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


async def mapped(settings: Settings, frame: Any, *words: Any, **named: Any) -> Any:
    """Call `map_frame` as code without an event loop does."""

    def work() -> Any:
        with JobClient(settings) as client:
            return map_frame(client, frame, *words, **named)

    async with asyncio.timeout(60):
        return await asyncio.to_thread(work)


async def test_a_frame_of_pandas(settings: Settings, worker: PlayedWorker):
    frame = pd.DataFrame(
        {"q": ["one", "two", None, "one", " "], "n": range(5)}, index=[10, 11, 12, 13, 14]
    )
    told = await mapped(settings, frame, "q", into="said", system="Be brief.")
    assert list(told.index) == list(frame.index)
    assert [text if isinstance(text, str) else None for text in told["said"]] == [
        "ONE",
        "TWO",
        None,
        "ONE",
        None,
    ]
    assert list(told["n"]) == list(frame["n"])
    assert sorted(told["said_provenance"].dropna()) == ["coalesced", "generated", "generated"]
    assert told["said_error"][12] == told["said_error"][14] == "the prompt is missing or empty"
    assert told["said_completion_tokens"][11] == 1
    assert "said" not in frame
    assert len(worker.ran) == 2


async def test_what_is_no_prompt_is_named(settings: Settings, worker: PlayedWorker):
    prompts = [7, float("nan"), pd.NA, pd.NaT, b"one", ["one"]]
    told = await mapped(settings, pd.DataFrame({"q": prompts}, index=[0] * 6), "q")
    assert list(told["answer_error"]) == [
        "the prompt is int and not text",
        *["the prompt is missing or empty"] * 3,
        "the prompt is bytes and not text",
        "the prompt is list and not text",
    ]


async def test_a_frame_of_arrow(settings: Settings, worker: PlayedWorker):
    table = pa.table({"q": ["one", None, "three"]})
    told = await mapped(settings, table, "q", sampling={"temperature": 1, "seed": 4})
    assert isinstance(told, pa.Table)
    assert told.column("answer").to_pylist() == ["ONE", None, "THREE"]
    vectors = await mapped(settings, table, "q", into="vector", embed=True)
    assert vectors.column("vector").to_pylist() == [[3.0, 0.5], None, [5.0, 0.5]]
    # A second time into the same column takes its place.
    again = await mapped(settings, told, "q")
    assert again.column_names == told.column_names
    # Parts of a table have the types of the whole, even where they hold nothing.
    (batch,) = pa.table({"q": ["one"]}).to_batches()
    for part in (batch, table.slice(1, 1), table.slice(0, 0)):
        made = await mapped(settings, part, "q")
        assert type(made) is type(part)
        assert made.schema == told.schema


async def test_what_is_wrong_with_a_frame_is_said_before_any_row_runs(
    settings: Settings, worker: PlayedWorker
):
    frame = pd.DataFrame({"q": ["one"]})
    for words, named, says in (
        ((frame, "p"), {}, "column: is no column of the frame; it has"),
        ((pd.concat([frame, frame], axis=1), "q"), {}, "is the name of 2 columns; rename"),
        (([1], "q"), {}, "frame: must be a pandas DataFrame"),
        ((frame, "q"), {"sampling": {"temperatur": 1}}, "did you mean 'temperature'"),
    ):
        with pytest.raises(InvalidRequestError, match=says):
            await mapped(settings, *words, **named)
    empty = await mapped(settings, frame.iloc[:0], "q")
    assert list(empty["answer"]) == []
    assert worker.ran == []


async def test_results_are_read_by_sql(
    client: AsyncJobClient, worker: PlayedWorker, stack: LocalStack, tmp_path: Path
):
    def asks(name: str, **more: Any) -> dict[str, Any]:
        return row(name, messages=[{"role": "user", "content": name}], **more)

    source = write(tmp_path / "in", [asks("fine"), asks("bad", fail=True)])
    summary = await run(client, source, tmp_path / "out")
    with psycopg.connect(
        stack.database_url.replace("+psycopg", ""), row_factory=dict_row
    ) as connection:
        rows = connection.execute(
            "SELECT * FROM job_results WHERE batch_id = %s ORDER BY row", [summary.batch_id]
        ).fetchall()
        (batch,) = connection.execute(
            "SELECT * FROM batch_progress WHERE batch_id = %s", [summary.batch_id]
        ).fetchall()
    fine, bad = rows
    assert (fine["custom_id"], fine["state"], fine["row"]) == ("fine", "done", 0)
    assert fine["answer"] == "FINE"
    assert fine["provenance"] == "generated"
    assert fine["body"]["choices"][0]["message"]["content"] == "FINE"
    assert not fine["packed"]
    assert (bad["state"], bad["error_type"]) == ("failed", "EngineFailedError")
    assert (batch["jobs"], batch["done"], batch["failed"], batch["total"]) == (2, 1, 1, 2)
    assert batch["status"] == "completed"
