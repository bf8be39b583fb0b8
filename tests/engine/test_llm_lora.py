"""Adapters: each answers for itself, and is known by its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from tests.engine.conftest import PLAIN, final_of, greedy
from tests.lora_adapter import RANK, adapter
from workers.bundled import bundled_model
from workers.engine import EnhancedAsyncLLM

pytestmark = pytest.mark.engine


def started(**kwargs: Any) -> EnhancedAsyncLLM:
    """Start an engine of another kind than the one that the other tests share."""
    common: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32"}
    model = str(bundled_model())
    return EnhancedAsyncLLM(model=model, handler_config=PLAIN, **common, **kwargs)


async def test_an_adapters_answer_is_its_own(tmp_path: Path) -> None:
    """An engine of its own: with adapters vLLM 0.32 dies of a request for prompt logprobs."""
    llm = started(enable_lora=True, max_lora_rank=RANK, max_loras=1)
    try:
        await adapted(llm, tmp_path)
    finally:
        await llm.aclose()


async def adapted(plain: EnhancedAsyncLLM, tmp_path: Path) -> None:
    one = LoRARequest("one", 1, str(adapter(tmp_path / "one", seed=1)))
    prompt, params = "The capital of France is", greedy(6, ignore_eos=True)
    bare = await final_of(plain, prompt, params)
    first = await final_of(plain, prompt, params, lora_request=one)
    assert not first.metadata["cached"]
    assert first.text != bare.text
    again = await final_of(plain, prompt, params, lora_request=one)
    assert (again.metadata["cached"], again.text) == (True, first.text)
    assert again.lora_request is one
    assert plain.forget(model="one") == 1
    assert (await final_of(plain, prompt, params)).metadata["cached"]
    first = await final_of(plain, prompt, params, lora_request=one)
    assert not first.metadata["cached"]
    # Known by its weights, not by its name or number.
    copied = LoRARequest("copy", 3, str(adapter(tmp_path / "copy", seed=1)))
    assert (await final_of(plain, prompt, params, lora_request=copied)).metadata["cached"]
    other = LoRARequest("one", 2, str(adapter(tmp_path / "other", seed=2)))
    changed = await final_of(plain, prompt, params, lora_request=other)
    assert not changed.metadata["cached"]
    assert changed.text != first.text
    assert (await final_of(plain, prompt, params)).text == bare.text
    # Other files in its place: which of them vLLM has in hand is not known, until it is told to
    # read them again.
    adapter(tmp_path / "one", seed=3)
    stale = await final_of(plain, prompt, params, lora_request=one)
    assert "have changed" in stale.metadata["not_reusable"]
    anew = LoRARequest("one", 1, one.lora_path, load_inplace=True)
    read = await final_of(plain, prompt, params, lora_request=anew)
    assert (read.metadata["cached"], read.metadata["not_reusable"]) == (False, None)
    assert read.text != first.text
