"""Every code block of the README and of docs/ is run, in the order of its page, as a reader would.

Python blocks are programs; blocks without a language are commands, a line each; a block under
``<!-- file: NAME -->`` is a file that those use. What cannot be run here is listed below, with the
reason; a test elsewhere parses it.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import yaml
from sqlalchemy.engine import make_url

from tests.acceptance.conftest import Deployment
from workers import fleet_file
from workers.local import LocalStack

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>[\w.-]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
#: How a command begins that is not run, and why.
NOT_RUN = {
    "make ": "sets up, builds or tests all of the project, this test included",
    "docker ": "there is no container engine",
    "promptmill up": "the deployment under test is one; it goes on until it is stopped",
    "promptmill worker": "the same",
    "promptmill db upgrade": "names a server that does not exist",
    "export PROMPTMILL_": "the same",
    "deploy/make-secrets.sh": "writes into the checkout; tests/integration/test_deploy.py runs it",
    "pip install": "installs from an index",
    "git ": "fetches from afar",
    "psql ": "names a server that does not exist",
    "redis-cli ": "the client is not a part of the package",
    "curl ": "asks a server that is not a part of the page",
    "printf ": "tests/unit/test_docs.py runs it",
    "prometheus ": "a server of one's own",
    "promtool ": "a tool of one's own",
}
#: What a program holds that is not run, and why.
NOT_RUN_PROGRAMS = {
    "EnhancedAsyncLLM(": "makes an engine of its own; tests/engine/test_llm_example.py runs it",
}
#: An id that pages show stands for that of a job there is.
_SHOWN_ID = "6f9619ff-8b86-4d01-b42d-00cf4fc964ff"
#: In place of the files that pages speak of. It ends with its first word, so it is not cut short.
_ROW = json.dumps(
    {
        "custom_id": "row",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": [{"role": "user", "content": "Is the sky blue?"}],
            "max_completion_tokens": 40,
            "stop": [" "],
        },
    }
)
_MOST_S = 240.0


@dataclass(frozen=True)
class Block:
    """One block of a page."""

    language: str
    text: str
    file: str | None


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["language"], found["text"], found["file"])
        for found in _BLOCK.finditer(page.read_text())
    ]


@dataclass
class Reader:
    """Somebody who does what a page says, in a folder of their own."""

    folder: Path
    environment: dict[str, str]
    database_url: str

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_MOST_S,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def follow(self, block: Block) -> None:
        if block.file is not None:
            (self.folder / block.file).write_text(block.text)
            if block.language == "yaml":
                fleet_file.read(self.folder / block.file)
        elif block.language == "python":
            if not any(word in block.text for word in NOT_RUN_PROGRAMS):
                self.run([sys.executable, "-c", block.text])
        elif block.language in {"", "sh"}:
            for line in block.text.splitlines():
                self.type(line)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "sql":
            self.ask(block.text)
        else:
            # Output, and formats that tests/unit/test_docs.py reads.
            assert block.language in {"text", "json"}, block.language

    def type(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        if not words or line.startswith(tuple(NOT_RUN)):
            return
        assert words[0] == "promptmill", line
        of = self.batch if words[1] == "batch" else self.job
        words = [of() if word == _SHOWN_ID else word for word in words]
        self.run([sys.executable, "-m", "workers.cli", *words[1:]])

    def ask(self, query: str) -> None:
        url = make_url(self.database_url).set(drivername="postgresql")
        query = query.replace(_SHOWN_ID, self.batch())
        with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
            connection.execute(query.encode())

    def batch(self) -> str:
        words = [sys.executable, "-m", "workers.cli", "batch", "list", "--json"]
        return str(json.loads(self.run(words))[0]["id"])

    def job(self) -> str:
        command = "submit x --max-tokens 1 --completion"
        return self.run([sys.executable, "-m", "workers.cli", *command.split()]).strip()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says(
    page: Path, deployment: Deployment, stack: LocalStack, tmp_path: Path
):
    environment = deployment.environment() | {
        # A channel, a cache and keys of this page's own.
        "PROMPTMILL_NAMESPACE": f"docs-{uuid4().hex[:12]}",
        "PYTHONPATH": str(ROOT),
    }
    for name in ("requests.jsonl", "questions.jsonl", "in.jsonl"):
        (tmp_path / name).write_text(_ROW + "\n")
    (tmp_path / "answer.json").write_text('{"enum": ["yes", "no"]}')
    reader = Reader(tmp_path, environment, stack.database_url)
    for block in blocks(page):
        reader.follow(block)
