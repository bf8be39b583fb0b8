"""With which of vLLM's arguments a model is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from schema.errors import ConfigurationError
from workers import fleet_plan, serving
from workers.settings import load_settings


def words_for(monkeypatch: pytest.MonkeyPatch, *given: str, cpu: bool) -> tuple[str, ...]:
    monkeypatch.setattr(serving, "built_for_cpu", lambda: cpu)
    return serving.served_model(load_settings(model="some/model"), engine_args=given).engine_args


def test_nothing_is_compiled_on_a_cpu_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words_for(monkeypatch, cpu=True) == ("--enforce-eager",)
    assert words_for(monkeypatch, cpu=False) == ()


@pytest.mark.parametrize(
    "given",
    [
        ("--no-enforce-eager",),
        ("--enforce-eager",),
        ("--compilation-config", '{"level": 3}'),
        ("--compilation_config={}",),
        ("-O3",),
        ("-O", "2"),
    ],
)
def test_whoever_says_it_himself_decides(
    monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    assert words_for(monkeypatch, *given, cpu=True) == given


def test_the_bundled_model_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("workers.bundled.bundled_model", lambda _cache: tmp_path)
    words = serving.served_model(load_settings(), engine_args=["--seed", "1"]).engine_args
    assert words[:2] == ("--max-model-len", "4096")
    assert words[-2:] == ("--seed", "1")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ((), ()),
        (("--lora-modules", "x=/a", "y=/b", "--seed", "1"), ("x", "y")),
        (("--seed", "1", "--lora_modules=x=/a"), ("x",)),
        (("--lora-modules", '{"name": "x", "path": "/a"}', "y=/b"), ("x", "y")),
    ],
)
def test_adapters_are_served_under_names_of_their_own(
    given: tuple[str, ...], names: tuple[str, ...]
) -> None:
    served = serving.served_model(load_settings(model="some/model"), engine_args=given)
    assert served.adapters == names
    assert served.names == ("some/model", *names)


@pytest.mark.parametrize(
    "module", ["some/model=/a", "a b=/a", '{"name": "x"', '{"path": "/a"}', "x=/a x=/b"]
)
def test_an_adapter_without_a_name_of_its_own_is_refused(module: str) -> None:
    words = ["--lora-modules", *(module.split() if "x=" in module else [module])]
    with pytest.raises(ConfigurationError, match=r"lora-modules|cannot name"):
        serving.served_model(load_settings(model="some/model"), engine_args=words)


def test_a_model_may_have_further_names() -> None:
    words = ["--seed", "1", "--served-model-name", "x", "some/model", "y", "--dtype=float32"]
    served = serving.served_model(load_settings(model="some/model"), engine_args=words)
    assert served.names == ("some/model", "x", "y")
    assert served.engine_args[-3:] == ("--seed", "1", "--dtype=float32")


def test_modules_of_a_file_are_words_that_vllm_reads() -> None:
    modules = [{"name": "x", "path": "/a"}, "y=/b"]
    words = serving.engine_words({"lora_modules": modules})
    assert words == ("--lora-modules", '{"name": "x", "path": "/a"}', "y=/b")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-modle-len", "8"], "--max-modle-len; did you mean '--max-model-len'?"),
        (["--max-model", "8"], "did you mean '--max-model-len'?"),  # no beginnings of names
        (["--max-model-len", "eight"], "--max-model-len: .*'eight'"),
        (["--dtype", "flaot16"], "--dtype: .*'flaot16'.*float16"),
        (["--compilation-config", "{"], "--compilation-config"),
        (["stray"], "no use for 'stray'"),
        (["--help"], "--help"),
    ],
)
def test_what_vllm_does_not_take_is_told_in_one_sentence(words: list[str], says: str) -> None:
    model = serving.ServedModel(name="m", path="m", engine_args=tuple(words))
    with pytest.raises(ConfigurationError, match=says) as caught:
        serving.vllm_arguments(model)
    assert "\n" not in str(caught.value).partition("validation error")[0]


def test_arguments_of_every_shape_reach_vllm() -> None:
    given = ["max_model_len=8k", "enforce_eager", "enable_prefix_caching=false", "seed=-1"]
    given += ["disable_log_stats=false", 'hf_overrides={"a": 1}', 'lora_modules=["x=/a", "y=/b"]']
    given += ["compilation_config.cudagraph_mode=NONE"]
    words = serving.engine_words(serving.named_arguments(given))
    model = serving.ServedModel(name="m", path="m", engine_args=words)
    args = serving.vllm_arguments(model)
    assert (args.max_model_len, args.seed) == (8000, -1)
    assert (args.enforce_eager, args.enable_prefix_caching) == (True, False)
    assert args.disable_log_stats is False
    assert args.hf_overrides == {"a": 1}
    assert [module.name for module in args.lora_modules] == ["x", "y"]
    assert args.compilation_config.cudagraph_mode.name == "NONE"


def test_a_model_is_no_engine_argument() -> None:
    """Its jobs would be answered by another model than the one they name."""
    with pytest.raises(ConfigurationError, match="give it as --model other"):
        serving.served_model(load_settings(model="some/model"), engine_args=["--model=other"])
    with pytest.raises(ConfigurationError, match="give it as --model other"):
        fleet_plan.plan(engine_args=["--model", "other"])
