"""`promptmill up --config` with two models and the real engine: each worker takes its own jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from schema.errors import UnknownModelError
from workers import JobClient, load_settings
from workers.local import bundled_model

# Two engines start: minutes, where cores are few.
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


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
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.cli", "up", "--config", fleet],
        env={**os.environ, "PROMPTMILL_DATA_DIR": str(settings.data_dir)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any(line.strip() == "ready" for line in process.stdout)
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
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
