"""The fingerprint of a request: equal for two requests only if their answers are interchangeable.

A SHA-256 over a canonical form of the namespace, the engine's identity, the LoRA adapter's content,
the prompt as the model sees it, and every sampling field but a few that cannot change the answer.
Fields that a newer vLLM adds are included because all are, not because they are listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams
    from vllm.lora.request import LoRARequest

#: Sampling fields that change how an answer is handed out, never the answer.
NEUTRAL_FIELDS = frozenset({"output_kind", "stream_interval", "skip_clone"})
#: Fields that vLLM fills in while it checks or runs a request; what they are made of is included.
_DERIVED_FIELDS = frozenset(
    {
        "_all_stop_token_ids",
        "_bad_words_token_ids",
        "_eos_token_id",
        "_watermarking_skipped",
        "output_text_buffer_length",
    }
)
_DERIVED_STRUCTURED = frozenset({"_backend", "_backend_was_auto"})

_encoder = msgspec.json.Encoder(order="deterministic")


def _plain(value: Any) -> Any:
    """Return `value` in types that encode to the same bytes every time."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, Mapping):
        return {f"{type(key).__name__}:{key}": _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(map(repr, value))}
    if isinstance(value, np.ndarray):
        return {"array": hashlib.sha256(value.tobytes()).hexdigest(), "shape": list(value.shape)}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return _plain(msgspec.to_builtins(value, enc_hook=repr))


def canonical_params(params: SamplingParams | PoolingParams) -> dict[str, Any]:
    """Return the fields that can change the answer, in plain types.

    Args:
        params: vLLM's sampling or pooling parameters, as the caller gave them.

    Returns:
        Field to value. A field that a newer vLLM adds is among them.
    """
    fields: dict[str, Any] = {"": type(params).__name__}
    for name in params.__struct_fields__:
        value = getattr(params, name)
        if value is None or name in NEUTRAL_FIELDS or name in _DERIVED_FIELDS:
            continue
        if name == "structured_outputs":
            value = {
                key: item
                for key, item in vars(value).items()
                if key not in _DERIVED_STRUCTURED and item is not None
            }
        fields[name] = _plain(value)
    return fields


def params_digest(params: SamplingParams | PoolingParams) -> bytes:
    """Return the SHA-256 of `canonical_params`.

    Args:
        params: As the caller gave them.
    """
    return hashlib.sha256(_encoder.encode(canonical_params(params))).digest()


def ids_digest(token_ids: Sequence[int]) -> str:
    """Return the SHA-256 of a prompt's token ids, in hexadecimal.

    Args:
        token_ids: As the model sees them.
    """
    return hashlib.sha256(np.asarray(token_ids, dtype=np.int64).tobytes()).hexdigest()


def prompt_parts(rendered: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what identifies a rendered prompt, or None when it has no exact identity.

    Args:
        rendered: An `EngineInput` of vLLM's renderer. Its arrival time is left out.
    """
    if rendered.get("type") not in {"token", "multimodal"} or "encoder_prompt" in rendered:
        return None
    parts: dict[str, Any] = {"ids": ids_digest(rendered["prompt_token_ids"])}
    if salt := rendered.get("cache_salt"):
        parts["salt"] = salt
    if rendered["type"] == "multimodal":
        parts["media"] = _plain(rendered["mm_hashes"])
    return parts


def fingerprint(
    *,
    namespace: str,
    engine: bytes,
    prompt: Mapping[str, Any],
    params: bytes,
    lora: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the 32 bytes under which an answer is stored and found.

    Args:
        namespace: Tenant.
        engine: Digest of the engine's identity.
        prompt: From `prompt_parts`.
        params: From `params_digest`.
        lora: Digest of the adapter's content, from `lora_digest`.
        extra: Other arguments that can change the answer (those of a reasoning parser).
    """
    canonical = {
        "namespace": namespace,
        "engine": engine.hex(),
        "prompt": prompt,
        "params": params.hex(),
        "lora": lora,
        "extra": _plain(extra or {}),
    }
    return hashlib.sha256(_encoder.encode(canonical)).digest()


def scope_digest(
    *,
    engine: bytes,
    context: bytes,
    params: bytes,
    lora: str | None,
    besides: Mapping[str, Any] | None = None,
) -> bytes:
    """Return what must be equal, beside the namespace, for an answer to be reused by meaning.

    Args:
        engine: Digest of the engine's identity.
        context: Digest of what surrounds the compared text: system prompt, earlier turns, tools.
        params: From `params_digest`.
        lora: Digest of the adapter's content.
        besides: What the model sees besides the text, or how it sees it: media, a cache salt,
            arguments of the tokenizer and of a reasoning parser.
    """
    canonical = [engine.hex(), context.hex(), params.hex(), lora]
    if besides:
        canonical.append(_plain(besides))
    return hashlib.sha256(_encoder.encode(canonical)).digest()


_lora_digests: dict[tuple[str, int, int], str] = {}


def lora_digest(request: LoRARequest | None) -> str | None:
    """Return a digest of an adapter's files, or None for no adapter.

    Args:
        request: vLLM's; its path is a folder or the name of a repository.
    """
    if request is None:
        return None
    folder = Path(request.lora_path)
    if not folder.is_dir():
        return f"name:{request.lora_name}:{request.lora_path}"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    key = (
        str(folder),
        max((path.stat().st_mtime_ns for path in files), default=0),
        sum(path.stat().st_size for path in files),
    )
    if key not in _lora_digests:
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        _lora_digests[key] = digest.hexdigest()
    return _lora_digests[key]
