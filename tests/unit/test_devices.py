"""What workers are bound to and started with; nothing here needs the devices."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schema.errors import (
    ConfigurationError,
    EngineGoneError,
    InvalidFileError,
    InvalidRequestError,
)
from workers import fleet_plan, pinning, serving
from workers.devices import Fleet, fetch_models
from workers.fleet_file import FleetFile, read
from workers.fleet_plan import Post, on_this_machine, plan
from workers.hardware import Gpu, gpus
from workers.pinning import (
    Device,
    check_gpus,
    device_here,
    let_engine_give_way,
    parse_gpus,
    share_cpu,
)
from workers.settings import Settings, load_settings
from workers.worker_process import READY, WorkerProcess


@pytest.fixture(autouse=True)
def _every_card_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


CARDS = [
    Gpu(index=0, name="H100", uuid="GPU-aaaa1111-0000"),
    Gpu(index=1, name="H100", uuid="GPU-bbbb2222-0000", slices=("MIG-cccc3333-0000",)),
]


@pytest.mark.parametrize(
    ("text", "environments"),
    [
        ("0", ["0"]),
        ("0:1", ["0", "1"]),
        ("0,1:2,3", ["0,1", "2,3"]),
        (" 0 , 1 ", ["0,1"]),
        ("GPU-aaaa:MIG-cccc", ["GPU-aaaa", "MIG-cccc"]),
        ("MIG-GPU-aaaa/1/0", ["MIG-GPU-aaaa/1/0"]),
    ],
)
def test_a_worker_a_group_pinned_before_it_starts(text: str, environments: list[str]):
    for device, cards in zip(parse_gpus(text), environments, strict=True):
        assert device.environment() == {
            "CUDA_VISIBLE_DEVICES": cards,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no device"),
        ("0,", "is no device"),
        ("cuda:0", "is no device"),
        ("-1", "is no device"),
        ("0;1", "is no device"),
        ("0 1", "is no device"),
        ("\N{SUPERSCRIPT TWO}", "is no device"),
        ("GPU-a b", "is no device"),
        ("0:0", "twice"),
        ("0:00", "twice"),
        ("MIG-a,MIG-b", "one MIG device"),
        ("0,GPU-a", "no mixture"),
    ],
)
def test_groups_that_cannot_be(text: str, says: str):
    with pytest.raises(InvalidRequestError, match=says) as caught:
        parse_gpus(text)
    assert caught.value.field == "gpus"


def test_cards_are_compared_with_those_there_are():
    found = check_gpus(parse_gpus("1:GPU-aaaa:MIG-cccc"), CARDS)
    assert [device.gpus for device in found] == [
        ("1",),
        ("GPU-aaaa1111-0000",),
        ("MIG-cccc3333-0000",),
    ]
    assert check_gpus(parse_gpus("7"), None)[0].gpus == ("7",)
    for text in ("2", "GPU-dddd", "MIG-dddd"):
        with pytest.raises(InvalidRequestError, match="is not here"):
            check_gpus(parse_gpus(text), CARDS)
    with pytest.raises(InvalidRequestError, match="may be any of 2"):
        check_gpus(parse_gpus("GPU-"), CARDS)


@pytest.mark.parametrize(
    "text",
    [
        "0:GPU-aaaa1111-0000",
        "GPU-aaaa:GPU-aaaa1111",
        "GPU-aaaa,GPU-aaaa1111-0000",
        "1:MIG-cccc",  # a card, and a part of it
        "MIG-cccc:MIG-cccc3333",
    ],
)
def test_two_names_of_one_card_are_seen_through(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet_plan, "built_for_cpu", lambda: False)
    with pytest.raises(InvalidRequestError, match=r"is the card that .* is too"):
        on_this_machine(plan(gpus=text), CARDS)


def test_a_card_that_a_scheduler_keeps_away_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet_plan, "built_for_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb2222-0000")
    assert on_this_machine(plan(gpus="1"), CARDS)[0].device.gpus == ("1",)
    for text in ("0", "GPU-aaaa"):
        with pytest.raises(InvalidRequestError, match="is not among CUDA_VISIBLE_DEVICES=GPU-bbbb"):
            on_this_machine(plan(gpus=text), CARDS)


def test_parts_of_a_card_are_workers_of_their_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fleet_plan, "built_for_cpu", lambda: False)
    cards = [Gpu(index=0, name="H100", uuid="GPU-aaaa", slices=("MIG-bbbb", "MIG-cccc"))]
    found = on_this_machine(plan(gpus="MIG-b:MIG-c"), cards)
    assert [post.device.gpus for post in found] == [("MIG-bbbb",), ("MIG-cccc",)]


def test_nvidias_listing_is_read():
    listing = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaaa1111-2222)
  MIG 3g.20gb     Device  0: (UUID: MIG-bbbb1111-2222)
  MIG 3g.20gb     Device  1: (UUID: MIG-cccc1111-2222)
GPU 1: NVIDIA H100 PCIe (UUID: GPU-dddd1111-2222)
"""
    found = gpus(listing)
    assert found is not None
    first, second = found
    assert first.slices == ("MIG-bbbb1111-2222", "MIG-cccc1111-2222")
    assert (second.index, second.name, second.uuid) == (1, "NVIDIA H100 PCIe", "GPU-dddd1111-2222")
    assert second.answers_to("1")
    assert first.answers_to("MIG-cccc")
    assert not second.answers_to("0")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ([], ["--tensor-parallel-size", "4"]),
        (["--data-parallel-size", "2"], ["--tensor-parallel-size", "2"]),
        (["--data-parallel-size=4"], []),
        (["-dp", "2", "-pp", "2"], []),
        (["--tensor_parallel_size=4"], []),
        (["-tp", "2", "-dp", "2"], []),
        (["--distributed-executor-backend", "ray", "-tp", "16"], []),
        (["--data-parallel-backend=ray", "-dp", "16"], []),
        (["--nnodes", "2", "-tp", "8"], []),
        # Two machines of four cards: what concerns this one are its own replicas.
        (["-dp", "4", "--data-parallel-size-local", "2"], ["--tensor-parallel-size", "2"]),
    ],
)
def test_a_group_is_tensor_parallel_unless_told_otherwise(given: list[str], asked: list[str]):
    (device,) = parse_gpus("0,1,2,3")
    assert list(device.engine_args(given)) == asked


@pytest.mark.parametrize("given", [["-tp", "2"], ["-dp", "3"], ["-tp", "two"], ["-pp", "0"]])
def test_ranks_that_do_not_fit_the_cards(given: list[str]):
    (device,) = parse_gpus("0,1,2,3")
    with pytest.raises(InvalidRequestError):
        device.engine_args(given)


def test_one_card_is_not_two_ranks():
    (device,) = parse_gpus("0")
    assert device.engine_args(["-tp", "1"]) == ()
    with pytest.raises(InvalidRequestError, match="1 card cannot be 2 ranks"):
        device.engine_args(["--tensor-parallel-size", "2"])


def test_vllm_takes_parallelism_of_its_own():
    words = serving.engine_words(
        {"data_parallel_size": 2, "distributed_executor_backend": "ray", "tensor_parallel_size": 4}
    )
    model = serving.ServedModel(name="m", path="m", engine_args=words)
    args = serving.vllm_arguments(model)
    assert args.data_parallel_size == 2
    assert args.distributed_executor_backend == "ray"
    assert args.tensor_parallel_size == 4


class TestCpu:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Four cores of two threads each, on two sockets; siblings are 0 and 4, 1 and 5…"""
        for cpu in range(8):
            topology = tmp_path / f"cpu{cpu}/topology"
            topology.mkdir(parents=True)
            (topology / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
            (topology / "core_id").write_text(f"{cpu % 2}\n")
        monkeypatch.setattr(pinning, "_TOPOLOGY", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")

    def test_cores_are_disjoint_and_memory_is_divided(self):
        first, second = share_cpu([1, 1])
        # One thread a core, and no worker over two sockets.
        assert first.environment() == {
            "VLLM_CPU_OMP_THREADS_BIND": "4,5",
            "VLLM_CPU_KVCACHE_SPACE": "4",
        }
        assert second.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "6,7"
        assert first.name == "cpu4-5"

    def test_one_worker_is_left_to_vllm(self):
        (only,) = share_cpu([1])
        assert only.environment() == {}
        assert only.name == "cpu"

    def test_threads_of_a_core_are_parted_when_there_are_too_few(self):
        devices = share_cpu([1] * 8)
        cpus = [cpu for device in devices for rank in device.cpus for cpu in rank]
        assert sorted(cpus) == list(range(8))
        assert devices[0].environment()["VLLM_CPU_KVCACHE_SPACE"] == "1"

    def test_each_rank_of_an_engine_has_cores_of_its_own(self):
        first, second = plan(workers=2, engine_args=["--tensor-parallel-size", "2"])
        assert first.device.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "4|5"
        assert second.device.environment()["VLLM_CPU_OMP_THREADS_BIND"] == "6|7"

    def test_too_many(self):
        with pytest.raises(ConfigurationError, match="9 workers need as many cores"):
            share_cpu([1] * 9)

    def test_what_is_unset_is_not_divided(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
        assert {device.cache_gib for device in share_cpu([1, 1])} == {None}


class TestPriority:
    @pytest.fixture
    def processes(self, tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
        """One named as vLLM's are and one that is not, of two threads each."""
        waits = "import threading; threading.Thread(target=input).start(); print(flush=True)"
        started = []
        for name in ("VLLM::Worker_TP0", "another"):
            (tmp_path / name).symlink_to(sys.executable)
            words = (str(tmp_path / name), "-c", waits)
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert process.stdout
            process.stdout.readline()
            started.append(process)
        yield started
        for process in started:
            process.communicate(b"\n", timeout=60)

    def steps(self, process: subprocess.Popen[bytes]) -> set[int]:
        """How much lower than this process its threads are."""
        threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(threads) == 2
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        return {os.getpriority(os.PRIO_PROCESS, thread) - ours for thread in threads}

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority")
    def test_every_thread_of_an_engine_on_a_cpu_gives_way(
        self, processes: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(pinning, "built_for_cpu", lambda: False)
        let_engine_give_way()
        assert [self.steps(process) for process in processes] == [{0}, {0}]
        monkeypatch.setattr(pinning, "built_for_cpu", lambda: True)
        let_engine_give_way()
        assert [self.steps(process) for process in processes] == [{5}, {0}]


def test_a_workers_name_is_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    named = f"qwen3@{socket.gethostname()}:gpu2+3:{os.getpid()}"
    assert pinning.worker_name("qwen3") == named


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "gpu0+1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aaaa1111-2222-3333"}, "gpu-aaaa1111"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0,1,2,5"}, "cpu0-2+5"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,3"}, "cpu0-3"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0-3|4-7"}, "cpu0-3+4-7"),
        ({"VLLM_CPU_OMP_THREADS_BIND": "auto"}, "cpu"),
    ],
)
def test_a_worker_is_named_after_its_device(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
):
    for variable in ("CUDA_VISIBLE_DEVICES", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert device_here() == name


class TestFile:
    def write(self, tmp_path: Path, text: str) -> Path:
        path = tmp_path / "fleet.yaml"
        path.write_text(text)
        return path

    def test_models_share_a_fleet(self, tmp_path: Path):
        path = self.write(
            tmp_path,
            """
            engine_args: {max_model_len: 8192, enforce_eager: true}
            workers:
              - {model: a/b, gpus: "0,1:2"}
              - {model: /models/e5, served_model_name: e5, gpus: "3",
                 engine_args: {runner: pooling, max_model_len: 512}}
            """,
        )
        pair, single, other = plan(file=read(path), engine_args=["--seed", "1"])
        assert pair.device.gpus == ("0", "1")
        common = ("--max-model-len", "8192", "--enforce-eager", "--seed", "1")
        assert pair.engine_args == ("--tensor-parallel-size", "2", *common)
        assert single.engine_args == common
        assert "512" in other.engine_args
        assert "8192" not in other.engine_args
        settings = load_settings(model="of/all", served_model_name="all")
        assert single.settings(settings).served_model_name is None
        assert single.settings(settings).model == "a/b"
        assert other.settings(settings).served_model_name == "e5"
        assert other.name == "gpu3 (e5)"

    def test_engine_arguments_alone(self, tmp_path: Path):
        path = self.write(tmp_path, "engine_args: {max_model_len: 512, dtype: null}")
        (post,) = plan(file=read(path), gpus="0")
        assert post.engine_args == ("--max-model-len", "512")
        assert post.device.gpus == ("0",)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("engine_args: [", "line 1|is not YAML"),
            ("engine_arg: {}", "engine_arg is not known"),
            ("workers: [{model: a, gpu: '0'}]", "workers.0.gpu is not known"),
            ("workers: [{model: a, gpus: 1:2}]", "workers.0.gpus: put it in quotes"),
            ("workers: [{model: a, count: 0}]", "workers.0.count: .* greater than or equal to 1"),
            ("- a", "the file: "),
            ("max_model_len: 512", "max_model_len is not known; arguments of .* engine_args"),
            ("workers: [{modle: a}]", "workers.0.modle is not known; did you mean 'model'"),
            ("engine_args: {seed: 1, seed: 2}", "seed is given twice"),
            ("engine_args: [seed]", "engine_args: .*dictionary"),
            ("workers: [{gpus: '0:1', count: 2}]", "workers.0: its cards say"),
            ("workers: [{gpus: 0}]", "workers.0.gpus: put it in quotes"),
            ("workers: [{model: a}\n  b", "fleet.yaml:2: it is not YAML"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, text: str, says: str):
        path = self.write(tmp_path, text)
        with pytest.raises(InvalidFileError, match=says) as caught:
            read(path)
        assert caught.value.path == str(path)

    def test_a_file_that_is_not_there(self, tmp_path: Path):
        with pytest.raises(InvalidFileError, match="cannot be read"):
            read(tmp_path / "none.yaml")

    def test_words_that_contradict_it(self):
        file = FleetFile.model_validate({"workers": [{"model": "a", "gpus": "0"}]})
        with pytest.raises(InvalidRequestError, match="leave out --gpus"):
            plan(file=file, gpus="1")
        twice = FleetFile.model_validate({"workers": [{"gpus": "0"}, {"gpus": "0"}]})
        with pytest.raises(InvalidRequestError, match="given to two workers"):
            plan(file=twice)
        with pytest.raises(InvalidRequestError, match="leave the number out"):
            plan(gpus="0:1", workers=3)


def test_the_cpus_build_is_not_asked_for_cards(monkeypatch: pytest.MonkeyPatch):
    posts = plan(gpus="0:GPU-bbbb")
    monkeypatch.setattr(fleet_plan, "built_for_cpu", lambda: True)
    with pytest.raises(ConfigurationError, match=r"promptmill\[gpu\]"):
        on_this_machine(posts, CARDS)
    monkeypatch.setattr(fleet_plan, "built_for_cpu", lambda: False)
    assert on_this_machine(posts, CARDS)[1].device.gpus == ("GPU-bbbb2222-0000",)


# A stand-in for a worker: it writes down what it was started with.
_CHILD = """
import json, os, sys
json.dump({"argv": sys.argv[1:], "environ": dict(os.environ)}, open(sys.argv[-1], "w"))
print("READY", flush=True)
sys.stdin.read()
""".replace("READY", READY)


def _started_with(fleet: Fleet, tmp_path: Path) -> list[dict[str, Any]]:
    places = []
    for number, worker in enumerate(fleet.workers):
        assert worker.command[:4] == [sys.executable, "-m", "workers.cli", "worker"]
        places.append(tmp_path / f"{number}.json")
        worker.command = [sys.executable, "-c", _CHILD, *worker.command[4:], str(places[-1])]
    fleet.start()
    try:
        fleet.wait_ready(60)
        return [json.loads(place.read_text()) for place in places]
    finally:
        fleet.stop_now()
        fleet.stop()


def test_what_a_child_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    monkeypatch.setenv("PROMPTMILL_SERVED_MODEL_NAME", "of-all")
    file = FleetFile.model_validate(
        {
            "engine_args": {"max_model_len": 512},
            "workers": [
                {"model": "a/b", "gpus": "0,1"},
                {"model": "c/d", "served_model_name": "d", "gpus": "GPU-aaaa1111"},
                {"count": 2},
            ],
        }
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    weights = {"a": 3.0}
    fleet = Fleet(load_settings(lease_s=7.0, namespace_weights=weights), plan(file=file))
    pair, single, *cpus = _started_with(fleet, tmp_path)
    assert pair["environ"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert pair["environ"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert pair["argv"][:-1] == [
        "--vllm-arg=--tensor-parallel-size",
        "--vllm-arg=2",
        "--vllm-arg=--max-model-len",
        "--vllm-arg=512",
    ]
    assert pair["environ"]["PROMPTMILL_MODEL"] == "a/b"
    assert pair["environ"]["PROMPTMILL_SERVED_MODEL_NAME"] == ""
    assert single["environ"]["CUDA_VISIBLE_DEVICES"] == "GPU-aaaa1111"
    assert single["environ"]["PROMPTMILL_SERVED_MODEL_NAME"] == "d"
    bound = [child["environ"]["VLLM_CPU_OMP_THREADS_BIND"] for child in cpus]
    assert sorted(bound) == ["0", "1"]
    for child in (pair, single, *cpus):
        assert child["environ"]["PROMPTMILL_LEASE_S"] == "7.0"
        assert json.loads(child["environ"]["PROMPTMILL_NAMESPACE_WEIGHTS"]) == weights


def _fleet_of(child: str, monkeypatch: pytest.MonkeyPatch, events: list[str]) -> Fleet:
    monkeypatch.setattr("workers.worker_process._BACKOFF_S", (0.0, 0.01, 0.02))
    fleet = Fleet(Settings(), [Device()], on_event=events.append)
    fleet.workers[0].command = [sys.executable, "-c", child]
    return fleet


def test_lines_of_several_workers_say_whose_they_are(tmp_path: Path):
    lines: list[str] = []
    fleet = Fleet(Settings(), [Device(gpus=("0",)), Device(gpus=("1",))], on_line=lines.append)
    script = _CHILD.replace("sys.stdin", "print('hello', flush=True); sys.stdin")
    for number, worker in enumerate(fleet.workers):
        worker.command = [sys.executable, "-c", script, str(tmp_path / f"{number}.json")]
    fleet.start()
    try:
        fleet.wait_ready(60)
        end = time.monotonic() + 60
        while len(lines) < 2 and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        fleet.stop_now()
        fleet.stop()
    assert sorted(lines)[:2] == ["gpu0: hello", "gpu1: hello"]


def test_a_worker_that_cannot_start_is_given_up_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
):
    events: list[str] = []
    fleet = _fleet_of("raise SystemExit('no such model')", monkeypatch, events)
    fleet.start()
    with pytest.raises(EngineGoneError, match="its last words:\nno such model"):
        fleet.wait_ready(60)
    fleet.stop()
    assert [event.split("; ")[1] for event in events[:-1]] == [
        "started anew in 0.01 s",
        "started anew in 0.02 s",
    ]
    assert "is given up" in events[-1]


def test_one_that_dies_again_and_again_later_is_given_up_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    events: list[str] = []
    # It takes jobs in its first life, and never starts again.
    child = (
        f"import pathlib; lived = pathlib.Path({str(tmp_path / 'lived')!r});"
        f"lived.exists() or print({READY!r}, flush=True); lived.touch();"
        "raise SystemExit('out of memory')"
    )
    fleet = _fleet_of(child, monkeypatch, events)
    fleet.start()
    worker: WorkerProcess = fleet.workers[0]
    assert worker.given_up.wait(60)
    fleet.stop()
    assert fleet.given_up
    assert events[-1].endswith("its last words:\nout of memory")


def test_a_folder_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path):
    settings = load_settings(model=str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match=r"there is no model at .*none"):
        fetch_models(settings, [Post(device=Device())], on_event=print)


def test_a_post_without_a_model_has_the_settings():
    settings = load_settings(model="m")
    assert Post(device=Device()).settings(settings) is settings


def test_the_script_that_shows_pinning_finds_who_strays(capsys: pytest.CaptureFixture[str]):
    from tools import prove_pinning

    families = {"gpu0": {10, 11}, "gpu1": {20}}
    wanted = {"gpu0": {"A"}, "gpu1": {"B"}}
    assert prove_pinning.faults(wanted, families, {11: {"A"}, 20: {"B"}, 99: {"A", "B"}}) == []
    strays = prove_pinning.faults(wanted, families, {11: {"A", "B"}, 20: set()})
    assert strays == [
        "gpu0 holds memory on B, not its own",
        "gpu1 holds none on B, which is its own",
    ]
    if gpus() is None:
        assert prove_pinning.main(["--gpus", "0"]) == 2
        assert "no NVIDIA card" in capsys.readouterr().err
