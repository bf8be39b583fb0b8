"""Stored answers as columns and JSON, and back, without losing anything."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

import numpy as np
import orjson

from workers.engine.protocols import Analysis, Neighbour, StoredAnswer, StoredCompletion
from workers.store import stored_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import RowMapping

    from workers.engine.protocols import Vector

_ANALYSES = UUID("5f0f2a52-5c1f-5d0e-9c65-0c1d5b1c2f9a")


def outputs_text(answer: StoredAnswer) -> str:
    """Write what replays an answer, for the column `outputs`.

    Args:
        answer: The answer.

    Returns:
        JSON that a jsonb column takes.
    """
    document: dict[str, Any] = {
        "completions": [vars(completion) for completion in answer.completions]
    }
    if answer.prompt_logprobs is not None:
        document["prompt_logprobs"] = answer.prompt_logprobs
    if answer.pooled is not None:
        document["pooled"] = _pooled_to_json(answer.pooled)
        document["pooled_dtype"] = answer.pooled_dtype
    if answer.similar is not None:
        document["similar"] = [
            {**vars(neighbour), "answer_id": str(neighbour.answer_id)}
            for neighbour in answer.similar
        ]
    if answer.enrichments:
        document["enrichments"] = dict(answer.enrichments)
    return stored_json.dump(document)


def answer_from(row: RowMapping) -> StoredAnswer:
    """Rebuild an answer.

    Args:
        row: The columns of `answers`, with both times as Unix time, and `analysis`.

    Returns:
        The answer, without its vectors.
    """
    outputs = stored_json.load(row["outputs"])
    analysis = stored_json.load(row["analysis"])
    similar = outputs.get("similar")
    return StoredAnswer(
        id=row["id"],
        namespace=row["namespace"],
        fingerprint=row["fingerprint"],
        engine=row["engine"],
        model=row["model"],
        kind=row["kind"],
        scope=row["scope"],
        prompt=row["prompt"],
        completions=tuple(_completion(item) for item in outputs["completions"]),
        prompt_logprobs=_logprobs(outputs.get("prompt_logprobs")),
        pooled=_pooled_from_json(outputs.get("pooled")),
        pooled_dtype=outputs.get("pooled_dtype"),
        analysis=None if analysis is None else Analysis.from_json(analysis),
        similar=None if similar is None else tuple(_neighbour(item) for item in similar),
        enrichments=outputs.get("enrichments", {}),
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        engine_s=row["engine_s"],
        tags=tuple(row["tags"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )


def digest(answer: StoredAnswer) -> bytes:
    """Return the SHA-256 of what a reader sees of an answer: its texts, or its pooled output.

    Args:
        answer: The answer.

    Returns:
        32 bytes.
    """
    seen = [completion.text for completion in answer.completions]
    text = stored_json.dump([seen, _pooled_to_json(answer.pooled)])
    return hashlib.sha256(text.encode()).digest()


def analysis_key(namespace: str, analysis: Analysis) -> tuple[UUID, bytes]:
    """Return the id under which the analysis of a text is kept, and the text's digest.

    The id follows from namespace, text and pipeline, so that nobody has to ask for it.

    Args:
        namespace: Tenant.
        analysis: The analysis.

    Returns:
        The id and the SHA-256 of the text.
    """
    text = hashlib.sha256(analysis.text.encode("utf-8", "surrogatepass")).digest()
    return uuid5(_ANALYSES, f"{namespace}\x00{analysis.pipeline}\x00{text.hex()}"), text


def vector_text(vector: Vector) -> str | None:
    """Write a vector as pgvector reads it.

    Args:
        vector: Shape [dimensions].

    Returns:
        Text, or None when a component is not finite, which pgvector refuses.
    """
    text = orjson.dumps(
        np.ascontiguousarray(vector, dtype=np.float32), option=orjson.OPT_SERIALIZE_NUMPY
    ).decode()
    return None if "null" in text else text


def _completion(item: Mapping[str, Any]) -> StoredCompletion:
    cumulative = item["cumulative_logprob"]
    return StoredCompletion(
        index=item["index"],
        text=item["text"],
        token_ids=tuple(item["token_ids"]),
        finish_reason=item["finish_reason"],
        stop_reason=item["stop_reason"],
        cumulative_logprob=None if cumulative is None else float(cumulative),
        logprobs=_logprobs(item["logprobs"]),
    )


def _logprobs(value: Any) -> Any:
    if value is None:
        return None
    return tuple(
        None
        if token is None
        else tuple((at, float(logprob), rank, text) for at, logprob, rank, text in token)
        for token in value
    )


def _neighbour(item: Mapping[str, Any]) -> Neighbour:
    return Neighbour(
        answer_id=UUID(item["answer_id"]),
        prompt=item["prompt"],
        similarity=float(item["similarity"]),
        clause=item.get("clause"),
    )


def _pooled_to_json(pooled: Any) -> Any:
    """Pack numbers that 32 bits hold exactly, as vLLM's do: digits would take far more room."""
    if pooled is None:
        return None
    try:
        exact = np.asarray(pooled, dtype=np.float64)
    except (TypeError, ValueError):  # ragged, or not numbers
        return {"json": pooled}
    packed = exact.astype(np.float32)
    if not np.array_equal(packed.astype(np.float64), exact, equal_nan=True):
        return {"json": pooled}
    data = base64.b64encode(packed.astype("<f4").tobytes()).decode()
    return {"f32": data, "shape": list(exact.shape)}


def _pooled_from_json(value: Any) -> Any:
    if value is None:
        return None
    if "json" in value:
        return value["json"]
    flat = np.frombuffer(base64.b64decode(value["f32"]), dtype="<f4")
    return flat.reshape(value["shape"]).tolist()
