"""What the enhanced engine relies on in vLLM: each test says what moved when a version moves it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import vllm
from packaging.requirements import Requirement
from vllm import PoolingParams, SamplingParams
from vllm.config import CacheConfig, ModelConfig, MultiModalConfig, VllmConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import (
    STREAM_FINISHED,
    CompletionOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from vllm.renderers.base import BaseRenderer
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector

import workers.engine
from schema.jobs import Sampling
from tools.vllm_surface import imported, surface
from workers.engine import EnhancedAsyncLLM, EnhancedRequestOutput, EnhancedRequestOutputCollector
from workers.engine.fingerprint import _DERIVED_FIELDS, NEUTRAL_FIELDS, canonical_params

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests/fixtures"


def test_add_request_has_vllms_signature() -> None:
    ours, theirs = (inspect.signature(cls.add_request) for cls in (EnhancedAsyncLLM, AsyncLLM))
    assert ours == theirs


def test_what_is_inherited_is_not_overridden() -> None:
    """Wrapping the native collector is what keeps these whole; see the module of the engine."""
    for name in ("generate", "encode", "_add_request"):
        assert name not in vars(EnhancedAsyncLLM), f"{name} is overridden"
    # Weights are changed by this one alone; the engine has to hear of it.
    for name in ("start_weight_update", "update_weights", "finish_weight_update"):
        assert "self.collective_rpc(" in inspect.getsource(getattr(AsyncLLM, name)), name
    assert issubclass(EnhancedRequestOutputCollector, RequestOutputCollector)
    assert issubclass(EnhancedRequestOutput, RequestOutput)


def test_public_names() -> None:
    assert workers.engine.__all__ == [
        "EnhancedAsyncLLM",
        "EnhancedRequestOutput",
        "EnhancedRequestOutputCollector",
        "HandlerConfig",
        "Parts",
        "RequestScope",
        "Reuse",
    ]


def alternatives() -> dict[str, set[str]]:
    """Return by name in which modules our code looks for what it imports from vLLM."""
    found: dict[str, set[str]] = {}
    for module, name in imported():
        found.setdefault(name, set()).add(module)
    return found


IMPORTED = alternatives()


@pytest.mark.parametrize("name", IMPORTED)
def test_an_imported_name_is_where_it_was(name: str) -> None:
    def has(module: str) -> bool:
        try:
            return hasattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            return False

    # Some that moved are looked for in the old place and the new; each module is vLLM's own.
    moved = len(IMPORTED[name]) > 1 and name == "make_arg_parser"
    found = [module for module in IMPORTED[name] if has(module)]
    missing = [] if moved and found else sorted(IMPORTED[name] - set(found))
    assert not missing, f"vLLM moved {name} out of {' and '.join(missing)}"


def fields_of(cls: Any) -> set[str]:
    """Return what an instance carries, whichever way its class says so."""
    names = set(getattr(cls, "__struct_fields__", ())) | set(dir(cls))
    if hasattr(cls, "__struct_fields__"):
        return names
    for one in cls.__mro__[:-1]:
        names |= set(vars(one).get("__annotations__", ()))
        # Attributes that a method sets, as `self.name = …`.
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(one)))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                names.add(node.attr)
    return names


RELIED_ON: dict[Any, set[str]] = {
    AsyncLLM: {
        "abort",
        "add_request",
        "collective_rpc",
        "encode",
        "errored",
        "get_tokenizer",
        "from_engine_args",
        "from_vllm_config",
        "generate",
        "get_num_unfinished_requests",
        "model_config",
        "renderer",
        "shutdown",
        "tokenizer",
        "vllm_config",
    },
    RequestOutputCollector: {
        "_input_stream_task",
        "aggregate",
        "close",
        "get",
        "get_nowait",
        "put",
        "ready",
        "request_id",
    },
    RequestOutput: {
        "ec_transfer_params",
        "finished",
        "kv_transfer_params",
        "lora_request",
        "outputs",
        "prompt",
        "prompt_logprobs",
        "prompt_token_id_logprobs",
        "prompt_token_ids",
        "request_id",
    },
    CompletionOutput: {
        "cumulative_logprob",
        "finish_reason",
        "index",
        "logprobs",
        "lora_request",
        "routed_experts",
        "sampling_mask",
        "stop_reason",
        "text",
        "token_ids",
        "weight_versions",
    },
    PoolingRequestOutput: {
        "error",
        "finished",
        "num_cached_tokens",
        "outputs",
        "prompt_token_ids",
        "request_id",
    },
    PoolingOutput: {"data"},
    Logprob: {"decoded_token", "logprob", "rank"},
    LoRARequest: {"load_inplace", "lora_int_id", "lora_name", "lora_path"},
    SamplingParams: {
        "clone",
        "extra_args",
        "flat_logprobs",
        "output_kind",
        "seed",
        "structured_outputs",
        "temperature",
    },
    PoolingParams: {"clone", "output_kind"},
    StructuredOutputsParams: {"_backend", "_backend_was_auto"},
    BaseRenderer: {"default_cmpl_tok_params", "render_cmpl", "render_cmpl_async"},
    VllmConfig: {
        "cache_config",
        "model_config",
        "speculative_config",
        "structured_outputs_config",
    },
    CacheConfig: {"cache_dtype", "enable_prefix_caching"},
    MultiModalConfig: {
        "interleave_mm_strings",
        "mm_processor_cache_gb",
        "mm_processor_kwargs",
        "video_pruning_rate",
    },
    SpeculativeConfig: {"model"},
    ModelConfig: {
        "dtype",
        "hf_overrides",
        "logits_processors",
        "logprobs_mode",
        "max_model_len",
        "model",
        "multimodal_config",
        "quantization",
        "revision",
        "runner_type",
        "seed",
        "served_model_name",
        "tokenizer",
        "tokenizer_revision",
        "try_get_generation_config",
    },
}


@pytest.mark.parametrize("cls", RELIED_ON, ids=lambda cls: cls.__name__)
def test_a_class_has_what_the_engine_uses(cls: Any) -> None:
    missing = RELIED_ON[cls] - fields_of(cls)
    assert not missing, f"vLLM's {cls.__name__} no longer has {sorted(missing)}"


#: Arguments that the engine hands over by name, or that a subclass is called with.
ARGUMENTS: dict[str, set[str]] = {
    "AsyncLLM.__init__": {
        "executor_class",
        "log_requests",
        "log_stats",
        "usage_context",
        "vllm_config",
    },
    "AsyncLLM.add_request": {
        "lora_request",
        "params",
        "prompt",
        "prompt_text",
        "reasoning_ended",
        "reasoning_parser_kwargs",
        "request_id",
        "tokenization_kwargs",
    },
    "AsyncLLM.abort": {"internal", "request_id"},
    "AsyncLLM.shutdown": {"timeout"},
    "AsyncLLM.generate": {"prompt", "request_id", "sampling_params"},
    "AsyncLLM.encode": {"pooling_params", "prompt", "request_id"},
    "RequestOutputCollector.__init__": {"output_kind", "request_id"},
    "RequestOutput.__init__": {
        "finished",
        "lora_request",
        "outputs",
        "prompt",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
    },
    "PoolingRequestOutput.__init__": {
        "finished",
        "num_cached_tokens",
        "outputs",
        "prompt_token_ids",
        "request_id",
    },
}


def surfaces() -> dict[str, dict[str, Any]]:
    """Return what each supported vLLM offers: the installed one, and those kept as names.

    A file of names is made by ``python tools/vllm_surface.py WHEEL``.
    """
    installed = surface(Path(vllm.__file__).parent.parent)
    kept = [json.loads(path.read_text()) for path in FIXTURES.glob("vllm-*.json")]
    return {one["version"]: one for one in (installed, *kept)}


SURFACES = surfaces()


@pytest.mark.parametrize("version", SURFACES)
def test_every_supported_vllm_has_what_the_engine_relies_on(version: str) -> None:
    """Read from source as text: of the build for GPUs, too, where there is no GPU."""
    found = SURFACES[version]
    unread = {module for modules in IMPORTED.values() for module in modules} - {*found["modules"]}
    assert not unread, f"run tools/vllm_surface.py on the wheel of {version}: {sorted(unread)}"
    for name, modules in IMPORTED.items():
        there = any(name in found["modules"].get(module, "").split() for module in modules)
        assert there, f"vLLM {version} has no {name} in {' or '.join(sorted(modules))}"
    for cls, used in RELIED_ON.items():
        missing = used - set(found["classes"][cls.__name__].split())
        assert not missing, f"vLLM {version}: {cls.__name__} has no {sorted(missing)}"
    for call, named in ARGUMENTS.items():
        unknown = named - set(found["arguments"][call].split())
        assert not unknown, f"vLLM {version}: {call} takes no {sorted(unknown)}"


def test_the_declared_versions_are_those_that_were_checked() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(one) for one in extras["optional-dependencies"]["gpu"]]
    (declared,) = (one.specifier for one in needed if one.name == "vllm")
    for version in SURFACES:
        assert version in declared
    for minor in range(20, 60):
        checked = any(version.startswith(f"0.{minor}.") for version in SURFACES)
        assert (f"0.{minor}.0" in declared) == checked, f"vLLM 0.{minor}"


def test_the_names_read_as_text_are_the_real_ones() -> None:
    """Else the check of what is not installed would check nothing."""
    found = SURFACES[vllm.__version__]
    for call in ARGUMENTS:
        owner, method = call.split(".")
        (cls,) = (one for one in RELIED_ON if one.__name__ == owner)
        real = list(inspect.signature(getattr(cls, method)).parameters)
        bare = [name for name in real if name not in {"self", "cls", "kwargs"}]
        assert found["arguments"][call].split() == bare
    for cls in (AsyncLLM, RequestOutputCollector, RequestOutput, PoolingRequestOutput):
        own = {name for name in vars(cls) if not name.startswith("_")}
        assert own <= set(found["classes"][cls.__name__].split())


def test_the_sentinel_of_streaming_input_is_a_finished_output() -> None:
    assert STREAM_FINISHED.finished
    assert STREAM_FINISHED.outputs == []


def test_the_parent_builds_a_collector_of_its_own() -> None:
    """Why the engine wraps: there is no place to hand another collector in."""
    assert "RequestOutputCollector(params.output_kind" in inspect.getsource(AsyncLLM.add_request)


def test_the_parents_readers_use_only_what_the_collector_offers() -> None:
    for method in (AsyncLLM.generate, AsyncLLM.encode):
        used = {
            node.attr
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method))))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "q"
        }
        assert used <= {"get", "get_nowait", "request_id", "close"}, (
            f"{method.__name__} reads {sorted(used)} of its collector"
        )


#: Public fields of `SamplingParams` that a job cannot set, and why.
NOT_FOR_JOBS = {
    "output_kind": "how outputs are cut is the pipeline's choice; a job says options.stream",
    "stream_interval": "as output_kind",
    "skip_clone": "vLLM's own flag about an object in memory",
    "output_text_buffer_length": "vLLM fills it in",
    "flat_logprobs": "a form of log probabilities in memory; the values are the same",
    "detokenize": "a job's answer is text",
    "extra_args": "arguments of plug-ins of one deployment; they may hold anything",
    "watermarking": "a matter of the deployment, set with the engine",
    "prompt_logprob_token_ids": "scoring of chosen tokens; an array, for use from Python",
    "prompt_logprob_start": "belongs to prompt_logprob_token_ids",
    "logprob_token_ids": "as prompt_logprob_token_ids",
    "trace_decode_token_ids": "replays a given answer to trace it; nothing is generated",
    "thinking_token_budget": "needs a reasoning parser, which a raw prompt does not have",
    "repetition_detection": "not offered by the engine's OpenAI handlers as a stable field",
    "routed_experts_prompt_start": "for training, not for answers",
    "skip_reading_prefix_cache": "how the answer is computed, not what it is",
}


def test_every_sampling_field_is_offered_or_left_out_for_a_reason() -> None:
    public = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    offered = set(Sampling.model_fields)
    unknown = public - offered - set(NOT_FOR_JOBS)
    assert not unknown, f"new in vLLM, neither in Sampling nor left out: {sorted(unknown)}"
    assert offered <= public, f"no longer in vLLM: {sorted(offered - public)}"
    assert not offered & set(NOT_FOR_JOBS)
    gone = set(NOT_FOR_JOBS) - public
    assert not gone, f"left out and no longer in vLLM: {sorted(gone)}"


def other_value(name: str, value: Any) -> Any:
    """Return a value of the field that differs from the default."""
    special = {
        "structured_outputs": StructuredOutputsParams(regex="[ab]+"),
        "output_kind": RequestOutputKind.DELTA,
        "stop": ["\n"],
    }
    if name in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return {"changed": 1} if value is None else [*value, "changed"]


@pytest.mark.parametrize("cls", [SamplingParams, PoolingParams])
def test_every_field_but_the_neutral_ones_changes_the_key(cls: Any) -> None:
    plain = cls()
    before = canonical_params(plain)
    for name in cls.__struct_fields__:
        changed = cls()
        setattr(changed, name, other_value(name, getattr(plain, name)))
        same = canonical_params(changed) == before
        assert same == (name in NEUTRAL_FIELDS | _DERIVED_FIELDS), name


def test_neutral_fields_are_these() -> None:
    """Each of them changes how an answer is handed out, and never the answer."""
    assert sorted(NEUTRAL_FIELDS) == ["output_kind", "skip_clone", "stream_interval"]
    assert set(SamplingParams.__struct_fields__) >= NEUTRAL_FIELDS | {
        name for name in _DERIVED_FIELDS if name != "_bad_words_token_ids"
    }


def test_a_field_of_a_newer_vllm_is_in_the_key() -> None:
    class NewerParams(SamplingParams):  # type: ignore[misc]
        novelty: int | None = None

    assert msgspec.structs.fields(NewerParams)[-1].name == "novelty"
    params = [NewerParams(novelty=value) for value in (1, 2)]
    assert canonical_params(params[0]) != canonical_params(params[1])
