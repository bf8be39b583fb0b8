"""Models of the hub: fetched from a small hub of this test's own, and what is said without one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c0ffee" * 6 + "c0ff"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": os.urandom(300_000),
    "pytorch_model.bin": b"the same once more",
    "original/consolidated.pth": b"and again",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    protocol_version = "HTTP/1.1"
    requested: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith(("/api/models/tiny/model", "/tiny/model/")):
            self.reply(404, b"{}", {"X-Error-Code": self.refusal(path)}, body=body)
        elif path.startswith("/api/"):
            self.reply(200, json.dumps(self.description(path)).encode(), {}, body=body)
        else:
            content = FILES[path.partition(f"{COMMIT}/")[2]]
            if body:
                self.requested.append(path.rpartition("/")[2])
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            self.reply(200, content, headers, body=body)

    def refusal(self, path: str) -> str:
        return "GatedRepo" if "gated" in path else "RepoNotFound"

    def description(self, path: str) -> Any:
        names = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in FILES.items()
        ]
        if "/tree/" in path:
            return names
        siblings = [{"rfilename": name} for name in FILES]
        return {"id": "tiny/model", "sha": COMMIT, "siblings": siblings, "private": False}

    def reply(self, code: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Address of the hub, and the files that were fetched from it."""
    requested: list[str] = []
    handler = type("OneHub", (Hub,), {"requested": requested})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(
    model: str, endpoint: str, home: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Fetch in a process, for the hub's library reads its address when it is imported."""
    code = (
        "import sys; from workers import hub; from schema.errors import PromptmillError\n"
        "try: print(hub.fetch(sys.argv[1]))\n"
        "except PromptmillError as exc: print(type(exc).__name__, exc); sys.exit(3)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PROMPTMILL_"))}
    return subprocess.run(
        [sys.executable, "-c", code, model],
        env={**environment, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_model_is_fetched_with_a_bar_and_kept(hub: tuple[str, list[str]], tmp_path: Path):
    endpoint, requested = hub
    done = fetch("tiny/model", endpoint, tmp_path)
    assert done.returncode == 0, done
    folder = Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    # Neither the weights in another format nor the trainer's own layout.
    assert sorted(requested) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "100%" in done.stderr
    # What is here needs no hub.
    again = fetch("tiny/model", "http://127.0.0.1:1", tmp_path)
    assert Path(again.stdout.strip()) == folder, again


def test_a_model_that_the_hub_does_not_have(hub: tuple[str, list[str]], tmp_path: Path):
    done = fetch("tiny/modle", hub[0], tmp_path)
    assert done.stdout.startswith("ConfigurationError the model hub has no tiny/modle"), done


def test_a_model_whose_terms_are_to_be_accepted(hub: tuple[str, list[str]], tmp_path: Path):
    done = fetch("gated/model", hub[0], tmp_path)
    assert "asks for its terms to be accepted" in done.stdout, done
    assert "HF_TOKEN" in done.stdout


def test_a_name_that_can_be_none(tmp_path: Path):
    done = fetch("no name at all", "http://127.0.0.1:1", tmp_path)
    assert "neither a folder here nor a name" in done.stdout, done


def test_up_says_so_when_the_hub_cannot_be_reached(tmp_path: Path):
    """The command as a user runs it; nothing else is started."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PROMPTMILL_"))}
    command = [sys.executable, "-m", "workers.cli", "up", "--model", "Qwen/Qwen3-0.6B"]
    for variables, says in (
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "the model hub at http://127.0.0.1:1 cannot be"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
    ):
        done = subprocess.run(
            command,
            env={
                **environment,
                "HF_HOME": str(tmp_path / "home"),
                "PROMPTMILL_DATA_DIR": str(tmp_path / "data"),
                **variables,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 3, done
        assert says in done.stderr
        assert "Qwen/Qwen3-0.6B" in done.stderr
        assert "bundled" in done.stderr or "a folder" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "data").exists()
