"""Giving up root, which PostgreSQL refuses to run as.

Linux only. What the servers need may lie below a folder that only root can enter, such as a virtual
environment in root's home. Nobody's folders are opened up for that: the process keeps the one
capability that lets it read and search, and only when it is needed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import StackError

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable

SERVICE_ACCOUNT = "promptmill"
"""The account that root makes for the servers."""

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who a process runs as."""

    uid: int
    """User id."""
    gid: int
    """Group id."""


def owner(path: Path) -> Account:
    """Return the account that ``path`` belongs to."""
    status = path.stat()
    return Account(uid=status.st_uid, gid=status.st_gid)


def service_account() -> Account:
    """Return the account that root runs servers as, making it when there is none.

    Where accounts cannot be made, the servers run as ``nobody``.
    """
    found = _account(SERVICE_ACCOUNT)
    if found is None and (useradd := shutil.which("useradd")):
        made = [useradd, "--system", "--user-group", "--no-create-home"]
        made += ["--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin", SERVICE_ACCOUNT]
        # Its outcome does not matter: another process may have made the account just now, and
        # without one there is nobody.
        subprocess.run(made, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        found = _account(SERVICE_ACCOUNT)
    return found or _account("nobody") or Account(uid=65534, gid=65534)


def become(account: Account, *, reach: Iterable[Path]) -> None:
    """Turn this process from root into ``account``, for good.

    A process that is not root stays what it is. Call it before the first thread starts.

    Args:
        account: Who to become.
        reach: Files and folders that must be readable afterwards. When one is not, the process and
            its children keep the capability to read and search.

    Raises:
        StackError: The kernel does not let this process change.
    """
    if os.geteuid() != 0:
        return
    # Found out before the change: after it, modules not yet imported may be out of reach.
    capability = _reading_capability()
    try:
        _prctl(_PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setgid(account.gid)
        os.setuid(account.uid)
    except OSError as error:
        msg = (
            f"PostgreSQL refuses to run as root, and root cannot become user {account.uid} here "
            f"({error.strerror}); run promptmill as an ordinary user, or set "
            "PROMPTMILL_DATABASE_URL and PROMPTMILL_REDIS_URL"
        )
        raise StackError(msg) from error
    closed = [path for path in reach if not os.access(path, os.R_OK)]
    if closed and capability is None:
        msg = f"user {account.uid}, which the servers run as, cannot read {closed[0]}"
        raise StackError(msg)
    _keep_only(capability if closed else None)


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies.

    To be called between fork and exec, after the user was changed: a change clears it.

    Args:
        parent: Process id of the parent; if it is gone already, this process ends at once.
        number: The signal.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def _account(name: str) -> Account | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return Account(uid=entry.pw_uid, gid=entry.pw_gid)


def _prctl(option: int, *arguments: int) -> None:
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _reading_capability() -> int | None:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("CapPrm:"):
            permitted = int(line.split()[1], 16)
            # Containers often hold only the second one.
            for capability in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE):
                if permitted >> capability & 1:
                    return capability
    return None


def _keep_only(capability: int | None) -> None:
    mask = 0 if capability is None else 1 << capability
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    # Effective, permitted and inheritable, for capabilities 0 to 31 and then 32 to 63.
    data = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
    if _libc.capset(header, data) != 0:
        number = ctypes.get_errno()
        raise StackError(f"root's capabilities cannot be given up: {os.strerror(number)}")
    if capability is not None:
        # Only ambient capabilities outlive the exec of the servers' binaries.
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)
