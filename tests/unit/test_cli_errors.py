"""What the command says when it cannot do what was asked, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from schema.errors import (
    BrokerUnavailableError,
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidFileError,
    InvalidRequestError,
    QueueFullError,
    ResultTimeoutError,
)
from workers.cli import main
from workers.cli.deployment import _engine_args, _masked
from workers.cli.shared import exit_code

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = (
    "submit",
    "up",
    "worker",
    "version",
    "doctor",
    "batch run",
    "batch submit",
    "batch status",
    "batch list",
    "batch cancel",
    "batch results",
    "jobs list",
    "jobs show",
    "jobs cancel",
    "jobs retry",
    "cache stats",
    "cache decisions",
    "cache label",
    "cache invalidate",
    "cache report-bad",
    "db upgrade",
    "config show",
)


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point at servers that are not there, so that nothing is ever started."""
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", "redis://:hidden@127.0.0.1:1/0")
    monkeypatch.setenv("PROMPTMILL_DATABASE_URL", "postgresql://u:hidden@127.0.0.1:1/none")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([*command.split(), "--help"]) == 0
    assert "Usage: promptmill" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nope"], "No such command 'nope'"),
        (["submit"], "Missing argument"),
        (["submit", "x", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["submit", ""], "prompt: is empty"),
        (["submit", "x", "--max-tokens", "0"], "sampling.max_tokens: must be greater"),
        (["submit", "x", "--temperature", "-1"], "sampling.temperature: must be greater"),
        (["submit", "x", "--temperature", "nan"], "sampling.temperature: must be a finite"),
        (["submit", "x", "--reuse", "exakt"], "did you mean 'exact'?"),
        (["submit", "x", "--priority", "10"], "priority: must be less"),
        (["submit", "x", "--namespace", "a b"], "namespace: must match"),
        (["submit", "x\x00"], "holds a NUL"),
        (["submit", "x", "--completion", "--system", "y"], "system: belongs to a chat"),
        (["batch", "run", "IN"], "Missing option"),
        (["batch", "run", "/nowhere", "-o", "out"], "/nowhere: cannot be read: No such file"),
        (["batch", "run", "/", "-o", "out"], "is a folder"),
        (["batch", "run", "{in}", "-o", "/nowhere/out"], "its folder does not exist"),
        (["batch", "run", "{in}", "-o", "/"], "is a folder"),
        (["batch", "run", "{in}", "-o", "out", "--retry", "all"], "must be failed or truncated"),
        (["batch", "run", "{in}", "-o", "out", "--reuse", "x"], "reuse: must be one of"),
        (["batch", "run", "{in}", "-o", "out", "--window", "0"], "Invalid value for '--window'"),
        (["batch", "run", "{empty}", "-o", "out"], "is empty"),
        (["batch", "run", "{csv}", "-o", "out"], "is not a file of one JSON object a line"),
        (["batch", "status", "seven"], "id: is not an id"),
        (["jobs", "show", "seven"], "job: is not the id of a job"),
        (["jobs", "retry"], "say which jobs, or which batch"),
        (["jobs", "list", "--state", "don"], "did you mean 'done'?"),
        (["cache", "report-bad", "seven"], "id: is not an id"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    words: list[str], says: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
):
    files = {name: tmp_path / name for name in ("in", "empty", "csv")}
    files["in"].write_text('{"custom_id": "a"}\n')
    files["empty"].write_text("")
    files["csv"].write_text("id,prompt\n1,hello\n")
    assert main([word.format_map(files) if word[0:1] == "{" else word for word in words]) == 2
    heard = capfd.readouterr()
    assert says in " ".join(heard.err.replace("│", " ").split())
    assert "Traceback" not in heard.err
    assert "hidden" not in heard.err
    assert heard.out == ""


@pytest.mark.parametrize("words", [["submit", "x"], ["jobs", "list"], ["cache", "stats"]])
def test_a_server_that_is_away_is_code_3(words: list[str], capfd: pytest.CaptureFixture[str]):
    assert main(words) == 3
    heard = capfd.readouterr().err
    assert heard.startswith("promptmill: ")
    assert heard.count("\n") == 1
    assert "hidden" not in heard


def test_the_traceback_is_there_for_those_who_want_it():
    with pytest.raises(InvalidFileError):
        main(["--debug", "batch", "run", "/nowhere", "-o", "out"])


def test_exit_codes():
    assert exit_code(ConfigurationError("x")) == 2
    assert exit_code(ResultTimeoutError("x")) == 124
    assert exit_code(KeyboardInterrupt()) == 130
    assert exit_code(ValueError("x")) == 1
    for error in (BrokerUnavailableError, DatabaseUnavailableError, QueueFullError):
        assert exit_code(error("x")) == 3


def test_settings_are_shown_with_their_origin_and_without_secrets(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PROMPTMILL_LEASE_S", "20")
    assert main(["config", "show", "--json"]) == 0
    shown = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert shown["lease_s"]["value"] == 20
    assert shown["lease_s"]["origin"] == "PROMPTMILL_LEASE_S"
    assert shown["drain_s"]["origin"] == "default"
    assert shown["redis_url"]["value"] == "redis://***@127.0.0.1:1/0"
    assert "hidden" not in json.dumps(shown)
    assert main(["config", "show"]) == 0
    assert "hidden" not in capfd.readouterr().out


def test_a_setting_that_is_wrong_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PROMPTMILL_LEASE_S", "soon")
    assert main(["submit", "x"]) == 2
    assert "PROMPTMILL_LEASE_S='soon'" in capfd.readouterr().err


def test_masking():
    assert _masked(3) == 3
    assert _masked(None) is None
    assert _masked("org/model") == "org/model"
    assert _masked("http://collector:4318") == "http://collector:4318"
    assert _masked("https://me:hidden@collector:4318/v1") == "https://***@collector:4318/v1"


@pytest.mark.parametrize(
    ("named", "plain", "words"),
    [
        (["max_model_len=8192"], None, ["--max-model-len", "8192"]),
        (["enforce_eager"], None, ["--enforce-eager"]),
        (["enforce-eager=true"], None, ["--enforce-eager"]),
        (["enable_prefix_caching=false"], None, ["--no-enable-prefix-caching"]),
        (["--dtype=half"], ["--seed", "1"], ["--dtype", "half", "--seed", "1"]),
        (["dtype=null", "seed=-1"], None, ["--seed", "-1"]),
        (['served_model_name=["a", "b"]'], None, ["--served-model-name", "a", "b"]),
        (
            ["lora_modules=x=/a", 'lora-modules={"name": "y", "path": "/b"}', "lora_modules=x=/a"],
            None,
            ["--lora-modules", "x=/a", '{"name": "y", "path": "/b"}'],
        ),
        (["hf_overrides={"], None, ["--hf-overrides", "{"]),  # vLLM says what is wrong with it
        (
            ["compilation_config.cudagraph_mode=NONE"],
            None,
            ["--compilation-config.cudagraph_mode", "NONE"],
        ),
        (["chat_template=[not JSON"], None, ["--chat-template", "[not JSON"]),
        (None, None, []),
    ],
)
def test_engine_arguments(named: list[str] | None, plain: list[str] | None, words: list[str]):
    assert _engine_args(named, plain) == words


@pytest.mark.parametrize("given", ["=8", "", "--=8"])
def test_an_engine_argument_has_a_name(given: str):
    with pytest.raises(InvalidRequestError, match="has no name"):
        _engine_args([given], None)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from workers.cli import main; main(['--help']); "
        "heavy = {'vllm', 'torch', 'spacy', 'numpy', 'celery', 'sqlalchemy', 'redis'}; "
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
