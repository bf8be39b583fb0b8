"""README and docs name only what exists, and their examples are code that can run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree as ET

import orjson
import pytest

from schema import names, openai_batch, wire
from schema.jobs import JobOptions, JobResult, JobSpec, JobState, OpenAIRequest, PromptRequest
from tests.unit.command_lines import check_command
from workers.envelope import DEFAULT_MAX_BYTES, check_item
from workers.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Made by a command that the page names.
GENERATED = {"deploy/secrets/"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SVG = "{http://www.w3.org/2000/svg}"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    found = [Block(*match.groups()) for match in FENCE.finditer(page.read_text())]
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def inline(page: Path) -> list[str]:
    """What stands between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def command_lines(page: Path) -> Iterator[str]:
    for block in blocks(page, ""):
        yield from (line.partition("  #")[0] for line in block.text.splitlines())
    yield from inline(page)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pages
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        assert not re.match(r"\w+:", target), "a page is read without a network"
        there = page if not path else (page.parent / path)
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


@pages
def test_files_and_modules_that_are_named_exist(page: Path):
    for word in inline(page):
        if re.fullmatch(r"[\w./-]+(\.(py|sh|sql|acl|yaml|toml|md|svg)|/)", word):
            if word in GENERATED:
                continue
            folders = (ROOT, page.parent, ROOT / "deploy")
            assert any((folder / word).exists() for folder in folders), word
        elif re.fullmatch(r"(workers|schema)(\.[a-z_]+)+", word):
            assert find_spec(word) is not None, word


@pages
def test_make_targets_exist(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in command_lines(page):
        if line.startswith("make "):
            assert line.split()[1] in targets, line


@pages
def test_commands_are_understood(page: Path):
    for line in command_lines(page):
        if line.startswith("promptmill "):
            check_command(shlex.split(line)[1:], mention=line in inline(page))


@pages
def test_settings_that_are_named_exist(page: Path):
    known = {f"{ENV_PREFIX}{field.upper()}" for field in Settings.model_fields}
    for name in re.findall(rf"{ENV_PREFIX}[A-Z_]+", page.read_text()):
        assert name in known, name


@pages
def test_python_examples_compile_and_find_what_they_import(page: Path):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Import):
                assert all(find_spec(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None
                assert find_spec(node.module) is not None, node.module
                if node.module.split(".")[0] in {"workers", "schema"}:
                    # By the list of what is public: vLLM takes too long to import.
                    public = import_module(node.module).__all__
                    assert {alias.name for alias in node.names} <= set(public), node.module


@pages
def test_python_examples_use_what_the_client_has(page: Path):
    from workers import JobClient
    from workers.submission import SubmitOptions

    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "client":
                assert hasattr(JobClient, node.func.attr), node.func.attr
                if node.func.attr == "submit":
                    given = {keyword.arg for keyword in node.keywords}
                    assert given <= set(SubmitOptions.__annotations__), given


def test_the_example_is_short_and_shows_its_output():
    readme = (ROOT / "README.md").read_text()
    assert len(blocks(ROOT / "README.md", "python")[0].text.strip().splitlines()) <= 15
    output = re.search(
        r"<!-- output of the example above -->\n```text\n(.*?)```", readme, re.DOTALL
    )
    assert output is not None
    assert "generated" in output[1]
    assert "exact" in output[1]


def test_the_first_screen_shows_the_thing_running():
    before = (ROOT / "README.md").read_text().partition("\n## ")[0]
    assert "](docs/img/top.svg)" in before
    assert len(before.splitlines()) <= 15


@pages
def test_json_examples_are_json(page: Path):
    for block in blocks(page, "json"):
        whole = block.text if block.text.startswith("{\n") else None
        for text in [whole] if whole else block.text.splitlines():
            json.loads(text)


def test_the_line_of_a_batch_is_told_of_field_by_field():
    page = ROOT / "docs/batches.md"
    (shown,) = [json.loads(b.text) for b in blocks(page, "json") if '"promptmill"' in b.text]
    result = JobResult(job_id=uuid4(), namespace="n", status=JobState.DONE, token=1, body={})
    line = json.loads(openai_batch.output_line(result, custom_id="q-1"))
    assert shown.keys() == line.keys()
    assert shown["response"].keys() == line["response"].keys()
    told = {*openai_batch._TOLD, "job_id"}
    assert shown["promptmill"].keys() <= told
    table = page.read_text().partition("## Interrupted")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in row.split(", ")
    }
    assert {f"`{name}`" for name in told} <= named


@pytest.mark.parametrize("page", ["settings", "metrics"])
def test_generated_pages_are_current(page: str):
    made = subprocess.run(
        [sys.executable, ROOT / f"tools/{page}_doc.py"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    text = (ROOT / f"docs/{page}.md").read_text()
    assert text == made.stdout, f"run: python tools/{page}_doc.py > docs/{page}.md"


class TestWireFormat:
    page = ROOT / "docs/wire-format.md"

    def found(self) -> list[dict]:
        return [json.loads(block.text) for block in blocks(self.page, "json")]

    def test_the_message_can_be_read(self):
        (message,) = [item for item in self.found() if "headers" in item]
        read = check_item(orjson.dumps(message), "promptmill.m", max_bytes=DEFAULT_MAX_BYTES)
        decoded = wire.decode(read["headers"][names.JOBS_HEADER])
        assert len(decoded.jobs) == 1
        assert not decoded.refused
        properties = message["properties"]
        queue = names.queue("smollm2-135m-instruct")
        assert properties["delivery_info"]["routing_key"] == queue
        # Those of the message that the client writes, and no others.
        route = wire.Route(namespace="default", model="smollm2-135m-instruct", priority=5)
        ours = orjson.loads(wire.encode(decoded, route))
        assert message.keys() == ours.keys()
        assert message["headers"].keys() == ours["headers"].keys()
        assert properties.keys() == ours["properties"].keys()
        assert message["body"] == ours["body"]

    def test_the_list_is_the_one_that_workers_read(self):
        (printed,) = re.findall(r"printf '([^']+)'", self.page.read_text())
        done = subprocess.run(["printf", printed], capture_output=True, check=True)
        assert done.stdout.decode() == names.priority_list("promptmill.smollm2-135m-instruct", 5)

    def test_jobs_and_results_are_valid(self):
        jobs = [item for item in self.found() if "request" in item]
        results = [item for item in self.found() if "job_id" in item]
        assert jobs
        assert results
        for job in jobs:
            JobSpec.model_validate_json(json.dumps(job), strict=True)
        for result in results:
            read = JobResult.model_validate_json(json.dumps(result), strict=True)
            assert result.keys() == JobResult.model_fields.keys()
            assert read.status == "done"

    def test_every_field_is_in_its_table(self):
        rows = set(re.findall(r"^\| `(\w+)` \|", self.page.read_text(), re.MULTILINE))
        assert rows == JobSpec.model_fields.keys() | JobOptions.model_fields.keys()
        kinds = {
            PromptRequest.model_fields["kind"].default,
            OpenAIRequest.model_fields["kind"].default,
        }
        shown = {
            job["request"]["kind"]
            for item in self.found()
            for job in [item, *item.get("headers", {}).get("promptmill", {}).get("jobs", ())]
            if "request" in job
        }
        assert shown == kinds

    def test_names_and_bounds_are_those_of_the_code(self):
        text = self.page.read_text()
        assert f"1 to {wire.MAX_MESSAGE_JOBS:,} jobs" in text
        assert f"{DEFAULT_MAX_BYTES // 2**20} MiB" in text
        for name in (names.DEAD_LETTERS, names.CANCELLATIONS):
            assert name in text
        assert names.results_stream("default", "default") in text
        # Derived as the page says, an id is that of the code.
        from uuid import UUID, uuid5

        (space,) = re.findall(r"UUID namespace `([\w-]+)`", text)
        assert uuid5(UUID(space), "default\0key") == names.job_id_for("default", "key")


@pytest.mark.parametrize("path", sorted((ROOT / "docs/img").glob("*.svg")), ids=lambda p: p.name)
def test_pictures_say_what_they_show(path: Path):
    root = ET.parse(path).getroot()  # noqa: S314  our own file
    assert root.findtext(f"{SVG}title")
    assert root.findtext(f"{SVG}desc")
    assert root.get("viewBox")


def test_the_engines_configuration_can_be_read(tmp_path: Path):
    from workers.engine.config import HandlerConfig

    (example,) = blocks(ROOT / "docs/engine.md", "json")
    path = tmp_path / "engine.json"
    path.write_text(example.text)
    config = HandlerConfig.from_file(path)
    assert config.policy("trial").shadow
    assert config.policy("other").threshold == HandlerConfig().similarity.threshold


def test_every_rule_of_the_guard_is_named():
    from workers.enrich.neighbours import ENGINE, NOT_NEAR_ENOUGH, WITHDRAWN
    from workers.enrich.rules import RULES

    named = set(inline(ROOT / "docs/engine.md"))
    assert {*RULES, ENGINE, NOT_NEAR_ENOUGH, WITHDRAWN, "too_late"} <= named
