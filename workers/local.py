"""The embedded stack: Postgres with pgvector and Valkey, without anything to install or configure.

``start`` joins the stack that runs on a data folder, or starts it; whoever holds a ``LocalStack``
keeps it up. ``workers.supervisor`` says how the servers come to their end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from schema.errors import StackError
from workers import privileges
from workers.bundled import BUNDLED_MODEL_NAME, bundled_model
from workers.settings import load_settings
from workers.supervisor import STATE_FILE
from workers.worker_process import FAMILY

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

__all__ = ["BUNDLED_MODEL_NAME", "LocalStack", "bundled_model", "running", "start"]

DEFAULT_GRACE_S = 1.0
"""Seconds the servers stay up after their last user, for the next command to find them warm."""

_HOME = "stack"
_ANSWER_TIMEOUT_S = 10.0
# The supervisor gives up first, so that its reason arrives here.
_MARGIN_S = 5.0

_connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()


@dataclass(frozen=True, kw_only=True)
class LocalStack:
    """A hold on the running stack; also a context manager that lets go at its end."""

    database_url: str
    """Address of the database ``promptmill``, for SQLAlchemy with psycopg."""
    redis_url: str
    """Address of Valkey, for redis-py: ``unix://`` and the socket's path."""
    data_dir: Path
    """The folder that the stack keeps its data below."""
    supervisor_pid: int
    """Process id of the supervisor."""
    _connection: socket.socket = field(repr=False, compare=False)

    def close(self, *, wait_s: float = 0.0) -> None:
        """Let go of the stack; its last user's leaving stops the servers. May be called again.

        Args:
            wait_s: Seconds to wait for the servers' end, if nobody else uses them. Without it the
                servers stop in the background.
        """
        with contextlib.suppress(OSError):  # the supervisor may be gone already
            self._connection.shutdown(socket.SHUT_WR)
            if wait_s > 0:
                self._connection.settimeout(wait_s)
                while self._connection.recv(4096):
                    pass
        self._connection.close()

    def __enter__(self) -> LocalStack:
        """Return the stack itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go of the stack."""
        self.close()


def start(
    data_dir: Path | None = None, *, timeout_s: float = 60.0, grace_s: float = DEFAULT_GRACE_S
) -> LocalStack:
    """Join the stack that runs on ``data_dir``, or start it there.

    As root the servers run as an unprivileged user: the owner of the data folder, or an account
    ``promptmill`` that is made when it is missing.

    Args:
        data_dir: Folder of the servers' data, made when it is missing; None takes
            ``PROMPTMILL_DATA_DIR``.
        timeout_s: Seconds that a start may take, an earlier stack's stop included.
        grace_s: Seconds the servers stay up after their last user; the starter's word counts.

    Returns:
        A hold on the stack. Close it, or let the process end, to let go.

    Raises:
        StackError: The stack cannot be started; the message says why and holds the last lines of
            the log when a server died.
    """
    data_dir = _absolute(data_dir)
    stack = _join(data_dir, timeout_s)
    if stack is not None:
        return stack
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        msg = "the embedded stack is not installed: `pip install 'promptmill[cpu]'`"
        raise StackError(msg) from None
    account = _prepare(data_dir)
    try:
        # Writable for root and for the folder's owner alike; the folder is closed to others.
        with FileLock(data_dir / _HOME / "start.lock", timeout=timeout_s, mode=0o666):
            stack = _join(data_dir, timeout_s)
            return stack or _launch(data_dir, account, timeout_s, grace_s)
    except Timeout:
        msg = f"another process has been starting the stack in {data_dir} for {timeout_s:g} s"
        raise StackError(msg) from None
    except OSError as error:
        raise _unusable(data_dir, error) from error


def running(data_dir: Path | None = None) -> bool:
    """Return whether a stack runs on the folder and lets this process join.

    Args:
        data_dir: The folder; None takes ``PROMPTMILL_DATA_DIR``.
    """
    stack = _join(_absolute(data_dir), _ANSWER_TIMEOUT_S)
    if stack is None:
        return False
    stack.close()
    return True


def _absolute(data_dir: Path | None) -> Path:
    return (data_dir or load_settings().data_dir).expanduser().absolute()


def _prepare(data_dir: Path) -> privileges.Account:
    """Make the folders and return whom the servers are to run as."""
    as_root = os.geteuid() == 0
    home = data_dir / _HOME
    try:
        if not data_dir.exists():
            # The servers' user has to pass through root's folder; their own is closed. Another
            # process may be making it at this moment.
            data_dir.mkdir(mode=0o711 if as_root else 0o700, parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)
        if not as_root:
            if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
            return privileges.Account(uid=os.geteuid(), gid=os.getegid())
        account = privileges.owner(home)
        if account.uid == 0:
            account = privileges.owner(data_dir)
        if account.uid == 0:
            account = privileges.service_account()
        os.chown(home, account.uid, account.gid)
    except OSError as error:
        raise _unusable(data_dir, error) from error
    return account


def _unusable(data_dir: Path, error: OSError) -> StackError:
    return StackError(
        f"the data folder {data_dir} cannot be used ({error.strerror or error}); "
        "set PROMPTMILL_DATA_DIR to a folder that can be written"
    )


def _join(data_dir: Path, timeout_s: float) -> LocalStack | None:
    """Return a hold on the running stack, or None when none takes part."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        state = json.loads((data_dir / _HOME / STATE_FILE).read_text(encoding="utf-8"))
        connection.connect(state["control"])
        # One that is stopping closes the connection instead of answering.
        return _hold(connection, data_dir, timeout_s)
    except (OSError, ValueError, KeyError):
        connection.close()
        return None


def _launch(
    data_dir: Path, account: privileges.Account, timeout_s: float, grace_s: float
) -> LocalStack:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "workers.supervisor"]
    command += ["--home", str(data_dir / _HOME), "--user-fd", str(theirs.fileno())]
    command += ["--uid", str(account.uid), "--gid", str(account.gid)]
    command += ["--timeout-s", str(timeout_s), "--grace-s", str(grace_s)]
    # Until it has a log of its own, what it says goes here.
    with theirs, tempfile.TemporaryFile() as said:
        try:
            # The process forks and ends at once; what stays is a child of none.
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
                # Nor is it of the family of the worker that happens to start it.
                env={
                    name: value
                    for name, value in os.environ.items()
                    if not name.startswith("PG") and name != FAMILY
                },
                check=False,
            )
            theirs.close()
            return _hold(ours, data_dir, timeout_s + _MARGIN_S)
        except TimeoutError:
            ours.close()
            log = data_dir / _HOME / "log" / "supervisor.log"
            msg = f"the embedded stack did not start within {timeout_s:g} s; see {log.parent}"
            raise StackError(msg) from None
        except (OSError, ValueError) as error:
            ours.close()
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [str(error)]
            msg = f"the supervisor of the embedded stack did not start: {lines[-1]}"
            raise StackError(msg) from error
        except StackError:
            ours.close()
            raise


def _hold(connection: socket.socket, data_dir: Path, timeout_s: float) -> LocalStack:
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(65536)
        if not part:
            raise ConnectionResetError(104, "the supervisor closed the connection")
        line += part
    state = json.loads(line)
    if "error" in state:
        raise StackError(state["error"])
    _connections.add(connection)
    return LocalStack(
        database_url=state["database_url"],
        redis_url=state["redis_url"],
        data_dir=data_dir,
        supervisor_pid=state["pid"],
        _connection=connection,
    )


def _forget_after_fork() -> None:
    # A forked child that outlives its killed parent must not keep the servers up.
    for connection in list(_connections):
        connection.close()


os.register_at_fork(after_in_child=_forget_after_fork)
