"""The process that owns the embedded servers.

``workers.local`` starts it. Each promptmill process holds a connection to it, and the kernel closes
that connection however the process ends. When the last one is closed the supervisor stops the
servers and goes. Should the supervisor itself be killed, the kernel tells the servers to stop.

A lock file is held by the supervisor and, inherited, by each process of the servers: whoever gets
the lock knows that none of them is left.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import StackError
from workers import privileges, servers

if TYPE_CHECKING:
    from types import FrameType

STATE_FILE = "stack.json"
"""Where the running stack says how it is reached, inside its home folder."""

# Linux' bound on a socket's path is 108 bytes with its closing NUL.
_SOCKET_PATH_BYTES = 107
_LONGEST_SOCKET_NAME = ".s.PGSQL.5432.lock"
_SHORT_FOLDER_CHARS = 60
_NEEDED_BYTES = 200 * 10**6
_POLL_S = 0.05
_RESTARTS = 5
_RESTART_WINDOW_S = 60.0
_RESTART_TIMEOUT_S = 60.0


class Supervisor:
    """Both servers, and the connections of those who use them.

    Args:
        home: Folder of the stack; owned by this process's user.
        grace_s: Seconds the servers stay up after the last user has gone.
    """

    def __init__(self, *, home: Path, grace_s: float) -> None:
        self._home = home
        self._grace_s = grace_s
        self._selector = selectors.DefaultSelector()
        self._users: set[socket.socket] = set()
        self._leaving: set[socket.socket] = set()
        self._restarts: list[float] = []
        self._stopping = False

    def run(self, first_user: socket.socket, deadline: float) -> None:
        """Start the servers, serve until the last user is gone, stop the servers.

        Args:
            first_user: Connection of the process that asked for the stack.
            deadline: When the start has to be done, in seconds of ``time.monotonic``.

        Raises:
            StackError: The servers could not be started.
        """
        with contextlib.ExitStack() as cleanup:
            lock = _lock_home(self._home, deadline)
            cleanup.callback(os.close, lock)
            self._check_room()
            _log_into(self._home / "log")
            sockets = _socket_folder(self._home)
            cleanup.callback(_remove_socket_folder, self._home, sockets)
            postgres = servers.Postgres(home=self._home, sockets=sockets, held_fd=lock)
            valkey = servers.Valkey(home=self._home, sockets=sockets, held_fd=lock)
            postgres.clear_stale_lock()
            self._servers: tuple[servers.Server, ...] = (valkey, postgres)
            for server in self._servers:
                cleanup.callback(server.stop)
                server.start()
            for server in self._servers:
                server.wait_ready(deadline)
            listener = self._listen(sockets / "control.sock")
            cleanup.callback(self._close_door, listener)
            self._publish(sockets)
            self._welcome(first_user)
            self._serve(listener)

    def _check_room(self) -> None:
        free = shutil.disk_usage(self._home).free
        if free < _NEEDED_BYTES:
            msg = (
                f"{free / 1e6:.0f} MB of disk are free at {self._home}; the embedded servers need "
                f"{_NEEDED_BYTES / 1e6:.0f} MB"
            )
            raise StackError(msg)

    def _listen(self, control: Path) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(control))
        listener.listen(128)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def _publish(self, sockets: Path) -> None:
        valkey, postgres = self._servers
        self._state = {
            "control": str(sockets / "control.sock"),
            "database_url": postgres.url,
            "redis_url": valkey.url,
        }
        part = self._home / f"{STATE_FILE}.part"
        part.write_text(json.dumps(self._state), encoding="utf-8")
        part.replace(self._home / STATE_FILE)

    def _serve(self, listener: socket.socket) -> None:
        wake, woken = socket.socketpair()
        wake.setblocking(False)
        woken.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGCHLD, _wake_only)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        self._selector.register(woken, selectors.EVENT_READ)
        empty_since: float | None = None
        while not self._stopping:
            self._revive_servers()
            if self._users:
                empty_since = None
            elif empty_since is None:
                empty_since = time.monotonic()
            elif time.monotonic() - empty_since >= self._grace_s:
                return
            pause = None if empty_since is None else self._grace_s
            for key, _ in self._selector.select(pause):
                if key.fileobj is listener:
                    self._admit(listener)
                elif key.fileobj is woken:
                    woken.recv(4096)
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)
            if self._users:
                # Those who were waiting for the servers to stop learn that they will not. Only
                # after all were heard: the others may have left in the same moment.
                self._dismiss_leaving()

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _admit(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            user, _ = listener.accept()
            self._welcome(user)

    def _welcome(self, user: socket.socket) -> None:
        user.setblocking(False)
        try:
            user.sendall(json.dumps({**self._state, "pid": os.getpid()}).encode() + b"\n")
        except OSError:  # it has gone already
            user.close()
            return
        self._users.add(user)
        self._selector.register(user, selectors.EVENT_READ)

    def _hear(self, user: socket.socket) -> None:
        try:
            if user.recv(4096):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._selector.unregister(user)
        self._users.discard(user)
        # Kept half open: one that closed in an orderly way may wait here for the servers' end.
        self._leaving.add(user)

    def _dismiss_leaving(self) -> None:
        for user in self._leaving:
            user.close()
        self._leaving.clear()

    def _close_door(self, listener: socket.socket) -> None:
        # Before the servers stop, so that whoever comes now starts a stack of its own and waits
        # for the lock.
        (self._home / STATE_FILE).unlink(missing_ok=True)
        listener.close()

    def _revive_servers(self) -> None:
        for server in self._servers:
            if not server.exited():
                continue
            now = time.monotonic()
            self._restarts = [t for t in self._restarts if now - t < _RESTART_WINDOW_S] + [now]
            _note(f"{server.name} ended by itself: {server.last_lines()}")
            if len(self._restarts) > _RESTARTS:
                raise StackError(f"{server.name} keeps ending: {server.last_lines()}")
            # PostgreSQL declines while processes of the old server live; they end within moments.
            time.sleep(_POLL_S * 2 ** len(self._restarts))
            server.start()
            with contextlib.suppress(StackError):
                server.wait_ready(now + _RESTART_TIMEOUT_S)


def main(arguments: list[str]) -> int:
    """Run the supervisor; ``workers.local`` alone calls it."""
    parser = argparse.ArgumentParser(prog="python -m workers.supervisor")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--uid", type=int, required=True)
    parser.add_argument("--gid", type=int, required=True)
    parser.add_argument("--user-fd", type=int, required=True)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    options = parser.parse_args(arguments)
    # Nobody's child: whoever started the stack may go before the others who use it.
    if os.fork() != 0:
        os._exit(0)
    os.umask(0o077)
    first_user = socket.socket(fileno=options.user_fd)
    first_user.set_inheritable(False)
    deadline = time.monotonic() + options.timeout_s
    try:
        account = privileges.Account(uid=options.uid, gid=options.gid)
        privileges.become(account, reach=_needed_paths(options.home))
        Supervisor(home=options.home, grace_s=options.grace_s).run(first_user, deadline)
    except StackError as error:
        _note(str(error))
        with contextlib.suppress(OSError):
            first_user.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return 1
    return 0


def _needed_paths(home: Path) -> list[Path]:
    binaries = [servers.postgres_folder() / "postgres", servers.valkey_binary()]
    python = [Path(sys.executable), Path(sys.prefix), Path(sys.base_prefix), Path(__file__)]
    return [home, *binaries, *python]


def _lock_home(home: Path, deadline: float) -> int:
    try:
        lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StackError(f"{home} cannot be written: {error.strerror}") from error
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                msg = f"the servers of an earlier run in {home} have not stopped in time"
                raise StackError(msg) from None
            time.sleep(_POLL_S)
        else:
            return lock


def _log_into(folder: Path) -> None:
    """Send this process's messages to its log from now on, and no longer to who started it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    log = folder / "supervisor.log"
    servers.rotate(log)
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())


def _socket_folder(home: Path) -> Path:
    folder = home / "run"
    if len(os.fsencode(folder / _LONGEST_SOCKET_NAME)) <= _SOCKET_PATH_BYTES:
        shutil.rmtree(folder, ignore_errors=True)  # sockets of a stack that was killed
        folder.mkdir(mode=0o700)
        return folder
    # The path is too long for a socket: a short one, of which the state file tells the others.
    with contextlib.suppress(OSError, ValueError, KeyError):
        old = Path(json.loads((home / STATE_FILE).read_text(encoding="utf-8"))["control"]).parent
        _remove_socket_folder(home, old)
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", tempfile.gettempdir()):  # noqa: S108
        # mkdtemp's folders are closed to others and have names that nobody can foresee.
        if parent and len(parent) < _SHORT_FOLDER_CHARS and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="promptmill-", dir=parent))
    msg = f"{home} is too long a path for a socket, and no shorter folder can be written"
    raise StackError(msg)


def _remove_socket_folder(home: Path, folder: Path) -> None:
    # Never more than a folder that this module made.
    if folder == home / "run" or folder.name.startswith("promptmill-"):
        shutil.rmtree(folder, ignore_errors=True)


def _wake_only(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: a handler must exist for the signal to reach the wakeup descriptor."""


def _note(message: str) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    print(f"{now} UTC {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
