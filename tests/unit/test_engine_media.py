"""Pictures in a prompt: known by vLLM's hash of their content, or not reused at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing.inputs import ProcessorInputs

from workers.engine.config import Features
from workers.engine.plan import Planner, RequestPlan
from workers.engine.scope import RequestScope


class Renderer:
    """Renders as vLLM's does, hashing included, but for a model's own tokenizer and processor."""

    default_cmpl_tok_params = SimpleNamespace(with_kwargs=lambda **_: None)

    async def render_cmpl_async(self, prompts: list[Any], _params: Any) -> list[dict[str, Any]]:
        (prompt,) = prompts
        ids = [ord(letter) for letter in prompt["prompt"]]
        inputs = ProcessorInputs(
            prompt=ids,
            mm_data_items=MultiModalDataParser().parse_mm_data(prompt["multi_modal_data"]),
            hf_processor_mm_kwargs=prompt.get("mm_processor_kwargs") or {},
        )
        hashes = inputs.get_mm_hashes("a model", "sha256")
        return [{"type": "multimodal", "prompt_token_ids": ids, "mm_hashes": hashes}]


def planner(*, cache_gb: float = 4, prefix_caching: bool = True) -> Planner:
    llm: Any = SimpleNamespace(
        renderer=Renderer(),
        tokenizer=None,
        model_config=SimpleNamespace(
            is_encoder_decoder=False,
            multimodal_config=SimpleNamespace(mm_processor_cache_gb=cache_gb),
        ),
        vllm_config=SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching)
        ),
    )
    return Planner(llm, engine=b"e", features=Features())


async def planned(of: Planner, colour: str, text: str = "What is it?", **more: Any) -> RequestPlan:
    prompt = {
        "prompt": text,
        "multi_modal_data": {"image": Image.new("RGB", (4, 4), colour)},
        **more,
    }
    params = SamplingParams(temperature=0.0)
    return await of.plan(
        {"request_id": "r", "prompt": prompt, "params": params}, scope=RequestScope()
    )


async def test_a_picture_is_known_by_its_content() -> None:
    of = planner()
    first = await planned(of, "red")
    assert first.key is not None
    assert (await planned(of, "red")).key == first.key
    others = [
        await planned(of, "blue"),
        await planned(of, "red", "What is that?"),
        await planned(of, "red", mm_processor_kwargs={"size": 2}),
    ]
    assert len({first.key, *(other.key for other in others)}) == 4


async def test_what_is_seen_besides_the_text_parts_neighbours() -> None:
    """The same question about another picture is another question, however near the words are."""
    of = planner()
    red = (await planned(of, "red")).scope_digest
    assert (await planned(of, "red", "And what is it?")).scope_digest == red
    assert (await planned(of, "blue")).scope_digest != red


@pytest.mark.parametrize(
    ("caches", "hashed"),
    [
        ({"cache_gb": 0, "prefix_caching": False}, False),
        ({"cache_gb": 0, "prefix_caching": True}, True),
        ({"cache_gb": 4, "prefix_caching": False}, True),
    ],
)
async def test_where_vllm_numbers_pictures_by_request_none_is_reused(
    caches: dict[str, Any], hashed: bool
) -> None:
    found = await planned(planner(**caches), "red")
    assert (found.key is not None) is hashed
    assert ("no hash of media" in (found.not_reusable or "")) is not hashed
    assert found.call["prompt"]["type"] == "multimodal"  # it is generated all the same
