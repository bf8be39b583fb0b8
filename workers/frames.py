"""`map_frame`: a column of prompts in, columns of answers and their provenance out.

Example::

    import pandas as pd

    from workers import JobClient
    from workers.frames import map_frame

    reviews = pd.read_csv("reviews.csv")
    with JobClient.from_settings() as client:
        told = map_frame(client, reviews, "review", system="Positive or negative?")
    print(told[["review", "answer", "answer_provenance"]])
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from schema.errors import InvalidRequestError, shown
from workers import parquet
from workers.batch_rows import DEFAULTS
from workers.submission import build_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from workers.batch import BatchOptions, BatchProgress
    from workers.client import JobClient

__all__ = ["map_frame"]

Frame = TypeVar("Frame")

_EMBEDDINGS = "/v1/embeddings"
#: Columns that are added, behind the name of the answers' own: what of an output line they hold.
ADDED = {
    "error": "error",
    "provenance": "provenance",
    "similarity": "similarity",
    "source_answer_id": "source_answer_id",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "seconds": "seconds",
}


def map_frame(
    client: JobClient,
    frame: Frame,
    column: str,
    *,
    into: str = "answer",
    system: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    embed: bool = False,
    options: BatchOptions = DEFAULTS,
    on_progress: Callable[[BatchProgress], None] | None = None,
) -> Frame:
    """Answer every prompt of a column.

    The rows run as a batch: those that begin alike next to each other, equal ones once, at most a
    window of them under way. A row that cannot be answered says why and stops no other.

    Args:
        client: Submits the rows.
        frame: A pandas `DataFrame`, or an Arrow `Table` or `RecordBatch`; it is left as it is.
        column: Name of the column of prompts. An empty or missing prompt gets no answer.
        into: Name of the column of answers, and the beginning of the others' names: ``_error``,
            ``_provenance``, ``_similarity``, ``_source_answer_id``, ``_prompt_tokens``,
            ``_completion_tokens`` and ``_seconds``.
        system: System prompt of every row.
        sampling: vLLM's sampling parameters by name, as for `JobClient.submit`.
        embed: Ask for the embedding of each text instead of an answer to it.
        options: As for a batch file: namespace, model, schema, window, reuse and so on.
        on_progress: Called after every change, often.

    Returns:
        A frame of the same kind with the columns added.

    Raises:
        InvalidRequestError: There is no such column, or a value cannot be accepted.
        PromptmillError: As `JobClient.run_batch`.
    """
    prompts = _prompts(frame, column)
    with tempfile.TemporaryDirectory(prefix="promptmill-frame-") as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        with source.open("wb") as file:
            file.writelines(_lines(prompts, system=system, sampling=sampling, embed=embed))
        if source.stat().st_size:
            whole = replace(options, resume=False, redo=None, errors=None)
            client.run_batch(str(source), str(target), whole, on_progress=on_progress)
        answers = _answers(target) if target.exists() else {}
    columns = _columns(answers, prompts, into, embed=embed)
    return _with(frame, columns, {into: "embedding" if embed else "text", **_kinds(into)})


def _lines(
    prompts: Sequence[object],
    *,
    system: str | None,
    sampling: Mapping[str, Any] | None,
    embed: bool,
) -> Any:
    body: dict[str, Any] = {}
    url = _EMBEDDINGS
    turns = [] if system is None else [{"role": "system", "content": system}]
    if not embed:
        # Once for all rows: what is wrong with the sampling is said before any row runs.
        probe = [*turns, {"role": "user", "content": "probe"}]
        asked: Any = build_spec(None, {"messages": probe, "sampling": dict(sampling or {})}).request
        url, body = asked.url, asked.body
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            continue
        own = (
            {"input": prompt}
            if embed
            else {"messages": [*turns, {"role": "user", "content": prompt}]}
        )
        line = {"custom_id": str(place), "method": "POST", "url": url, "body": {**body, **own}}
        yield orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _answers(target: Path) -> dict[int, dict[str, Any]]:
    with target.open("rb") as file:
        read = [(parquet.columns_of(raw), raw) for raw in file]
    return {int(found["custom_id"]): {**found, parquet.LINE: raw} for found, raw in read}


def _columns(
    answers: dict[int, dict[str, Any]], prompts: Sequence[object], into: str, *, embed: bool
) -> dict[str, list[Any]]:
    rows = [answers.get(place) or _unasked(prompt) for place, prompt in enumerate(prompts)]
    texts = [_embedding(row) if embed else row.get("answer") for row in rows]
    return {
        into: texts,
        **{f"{into}_{name}": [row.get(source) for row in rows] for name, source in ADDED.items()},
    }


def _unasked(prompt: object) -> dict[str, Any]:
    # pandas has several words for what is missing; none of them equals itself.
    missing = prompt is None or isinstance(prompt, str) or bool(_differs(prompt))
    fault = "missing or empty" if missing else f"{type(prompt).__name__} and not text"
    return {"error": f"the prompt is {fault}"}


def _differs(value: Any) -> bool:
    try:
        return bool(value != value)
    except (TypeError, ValueError):  # pandas' NA is neither; an array is many
        return type(value).__name__ == "NAType"


def _kinds(into: str) -> dict[str, str]:
    kinds = {"similarity": "number", "seconds": "number"}
    kinds |= {"prompt_tokens": "count", "completion_tokens": "count"}
    return {f"{into}_{name}": kinds.get(name, "text") for name in ADDED}


def _embedding(row: dict[str, Any]) -> list[float] | None:
    if parquet.LINE not in row or row["error"] is not None:
        return None
    body = orjson.loads(row[parquet.LINE])["response"]["body"]
    found: list[float] = body["data"][0]["embedding"]
    return found


def _prompts(frame: Any, column: str) -> list[object]:
    names = list(frame.column_names if _is_arrow(frame) else frame.columns)
    if column not in names:
        msg = f"is no column of the frame; it has {shown(names)}"
        raise InvalidRequestError(msg, field="column", value=column)
    if names.count(column) > 1:
        msg = f"is the name of {names.count(column)} columns; rename all but one"
        raise InvalidRequestError(msg, field="column", value=column)
    if _is_arrow(frame):
        listed: list[object] = frame.column(column).to_pylist()
        return listed
    return list(frame[column])


def _is_arrow(frame: object) -> bool:
    arrow = sys.modules.get("pyarrow")
    if arrow is not None and isinstance(frame, (arrow.Table, arrow.RecordBatch)):
        return True
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(frame, pandas.DataFrame):
        return False
    msg = f"must be a pandas DataFrame or an Arrow Table, not {type(frame).__name__}"
    raise InvalidRequestError(msg, field="frame")


def _with(frame: Any, columns: dict[str, list[Any]], kinds: dict[str, str]) -> Any:
    if not _is_arrow(frame):
        return frame.assign(**columns)
    arrow = parquet.pyarrow("pyarrow")
    # Named, for a column without a single value has no type that could be found out.
    types = {
        "text": arrow.string(),
        "number": arrow.float64(),
        "count": arrow.int64(),
        "embedding": arrow.list_(arrow.float64()),
    }
    for name, values in columns.items():
        made = arrow.array(values, type=types[kinds[name]])
        place = frame.schema.get_field_index(name)
        frame = (
            frame.append_column(name, made) if place < 0 else frame.set_column(place, name, made)
        )
    return frame
