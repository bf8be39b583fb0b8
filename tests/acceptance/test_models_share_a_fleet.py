"""`promptmill up --config` with two models and the real engine: each worker takes its own jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from schema.errors import UnknownModelError
from tests.lora_adapter import RANK, adapter
from workers import JobClient, Settings, load_settings
from workers.local import bundled_model

# Two engines start: minutes, where cores are few.
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@contextlib.contextmanager
def up(settings: Settings, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.cli", "up", *words],
        env={**os.environ, "PROMPTMILL_DATA_DIR": str(settings.data_dir)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any(line.strip() == "ready" for line in process.stdout)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0


def test_each_worker_takes_what_it_serves(tmp_path: Path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two workers need two cores")
    model = str(bundled_model())
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        yaml.safe_dump(
            {
                "engine_args": {"enforce_eager": True, "max_model_len": 512},
                "workers": [{"model": model, "served_model_name": name} for name in ("a", "b")],
            }
        )
    )
    settings = load_settings(data_dir=tmp_path / "data")
    with up(settings, "--config", str(fleet)) as process:
        workers = [child.environ() for child in psutil.Process(process.pid).children()]
        bound = {
            worker["PROMPTMILL_SERVED_MODEL_NAME"]: worker["VLLM_CPU_OMP_THREADS_BIND"]
            for worker in workers
            if "VLLM_CPU_OMP_THREADS_BIND" in worker
        }
        assert bound.keys() == {"a", "b"}
        assert set(bound["a"].split(",")).isdisjoint(bound["b"].split(","))
        with JobClient(settings) as client:
            for name in ("a", "b"):
                job = client.submit("What is AI?", model=name, sampling={"max_tokens": 4})
                assert job.result(120).text
            with pytest.raises(UnknownModelError, match="a, b"):
                client.submit("What is AI?", model="c")


def test_adapters_and_further_names_have_queues_of_their_own(tmp_path: Path):
    adapters = {name: adapter(tmp_path / name, seed=seed) for seed, name in enumerate("xy")}
    modules = [{"name": name, "path": str(path)} for name, path in adapters.items()]
    config = tmp_path / "engine.yaml"
    engine_args = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1, "dtype": "float32"}
    engine_args |= {"max_model_len": 512, "enforce_eager": True, "lora_modules": modules}
    engine_args["served_model_name"] = "z"  # beside its own
    config.write_text(yaml.safe_dump({"engine_args": engine_args}))
    settings = load_settings(data_dir=tmp_path / "data")
    sampling = {"max_tokens": 6, "ignore_eos": True}
    with up(settings, "--config", str(config)), JobClient(settings) as client:
        assert client.served_models() == {"smollm2-135m-instruct", "x", "y", "z"}

        def ask(model: str | None, **asked: Any) -> tuple[str, str]:
            named: dict[str, Any] = {"model": model} if model else {}
            job = client.submit(**asked, sampling=sampling, **named)
            result = job.result(120)
            assert result.text, result.error
            return result.text, result.metadata["provenance"]

        for asked in (
            {"prompt": "The capital of France is"},
            {"messages": [{"role": "user", "content": "What is AI?"}]},
        ):
            said = [ask(model, **asked) for model in ("smollm2-135m-instruct", "x", "y")]
            assert len({text for text, _ in said}) == 3
            assert {how for _, how in said} == {"generated"}
            # From the cache, each gets its own.
            again = [ask(model, **asked) for model in ("smollm2-135m-instruct", "x", "y")]
            assert again == [(text, "exact") for text, _ in said]
            assert ask("z", **asked) == again[0]
