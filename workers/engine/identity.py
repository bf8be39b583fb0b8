"""The identity of an engine: two engines share answers only when it is equal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import MultiModalConfig, VllmConfig

#: Files whose content decides what a model answers, weights aside.
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
#: Above this, a weight file is known by its size, its header and samples, not by every byte.
_WHOLE_BYTES = 2 * 2**30
_SAMPLE_BYTES = 16 * 2**20


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            for at in (0, size // 2, size - _SAMPLE_BYTES):
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return a digest of a model folder's weights, tokenizer and configuration.

    Args:
        folder: As ``save_pretrained`` writes it.
    """
    digest = hashlib.sha256()
    names = {path for pattern in (*_SMALL_FILES, *_WEIGHT_FILES) for path in folder.glob(pattern)}
    for path in sorted(names):
        digest.update(f"{path.name}\0{_file_digest(path)}\0".encode())
    return digest.hexdigest()


def _weights(model: str, revision: str | None) -> str:
    if Path(model).is_dir():
        return f"folder:{folder_digest(Path(model))}"
    if Path(model).is_file():
        return f"file:{_file_digest(Path(model))}"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    # …/snapshots/<commit>/config.json
    commit = Path(cached).parent.name if isinstance(cached, str) else revision
    return f"repository:{model}@{commit}"


def _seen_as(media: MultiModalConfig | None) -> dict[str, str]:
    """Return what decides how a model sees media, which are known by their content alone."""
    if media is None:
        return {}
    names = ("interleave_mm_strings", "mm_processor_kwargs", "video_pruning_rate")
    return {name: repr(getattr(media, name)) for name in names}


def describe(config: VllmConfig) -> dict[str, Any]:
    """Return what decides the answers of an engine, as JSON types.

    Args:
        config: The engine's configuration, as vLLM made it.
    """
    import vllm

    model = config.model_config
    speculative = config.speculative_config
    return {
        "vllm": vllm.__version__,
        "weights": _weights(model.model, model.revision),
        "tokenizer": (
            None
            if model.tokenizer == model.model
            else _weights(model.tokenizer, model.tokenizer_revision)
        ),
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "max_model_len": model.max_model_len,
        "generation_config": model.try_get_generation_config(),
        "hf_overrides": repr(model.hf_overrides),
        "runner": model.runner_type,
        "pooler": repr(getattr(model, "pooler_config", None)),
        "logits_processors": repr(model.logits_processors),
        "logprobs_mode": str(model.logprobs_mode),
        "media": _seen_as(model.multimodal_config),
        "speculative": None if speculative is None else repr(speculative.model),
        "seed": model.seed,
        "watermark": repr(getattr(config, "watermark_config", None)),
        "structured_outputs": repr(config.structured_outputs_config),
    }


def engine_digest(config: VllmConfig) -> bytes:
    """Return the SHA-256 of `describe`.

    Args:
        config: The engine's configuration, as vLLM made it.
    """
    text = json.dumps(describe(config), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).digest()
