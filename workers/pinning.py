"""What one worker is bound to: graphics cards, or cores of the CPU and a share of memory.

A worker is bound by variables that it is started with, so before anything in it touches CUDA or
makes threads.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError, InvalidRequestError
from workers.versions import installed

if TYPE_CHECKING:
    import psutil

    from workers.hardware import Gpu

_CPUS = "VLLM_CPU_OMP_THREADS_BIND"
_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
# How vLLM names the processes of an engine, and of these the ones that compute.
_ENGINE = "VLLM::"
_COMPUTING = "VLLM::Worker"
# Of two threads that want a core, the one five steps lower gets a quarter of it, and leaves it
# when the other wakes. What enriches is lower still; see `workers.enrich.child_main`.
_NICE = 5
_CARDS = "CUDA_VISIBLE_DEVICES"
_SHOWN_UUID = 12  # characters: enough to tell cards of one machine apart
_TOPOLOGY = Path("/sys/devices/system/cpu")
_TENSOR = ("--tensor-parallel-size", "-tp")
_PIPELINE = ("--pipeline-parallel-size", "-pp")
_CONTEXT = ("--prefill-context-parallel-size", "-pcp")
_REPLICAS = ("--data-parallel-size", "-dp")
_REPLICAS_HERE = ("--data-parallel-size-local", "-dpl")
#: Who places the ranks, where that is not vLLM on this machine alone.
_PLACING = (
    (("--distributed-executor-backend",), "ray"),
    (("--data-parallel-backend", "-dpb"), "ray"),
)
_MACHINES = ("--nnodes", "-n")
_NAMED = re.compile(r"\d+|(GPU|MIG)-[\w/-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one worker runs on."""

    gpus: tuple[str, ...] = ()  # indices, UUIDs or MIG names; none is the CPU
    cpus: tuple[tuple[int, ...], ...] = ()  # by rank of the engine; none leaves them to vLLM
    cache_gib: int | None = None  # of memory for the key-value cache on the CPU; None: vLLM's

    @property
    def name(self) -> str:
        """Part of the worker's name, such as ``gpu0+1`` or ``cpu0-3``."""
        if self.gpus:
            return _cards_name(self.gpus)
        return f"cpu{_ranges([cpu for rank in self.cpus for cpu in rank])}"

    def environment(self) -> dict[str, str]:
        """Variables that bind a process to it."""
        if self.gpus:
            # By bus order, so that an index means the same as in nvidia-smi.
            return {_CARDS: ",".join(self.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        found = {}
        if self.cpus:
            found[_CPUS] = "|".join(",".join(map(str, rank)) for rank in self.cpus)
        if self.cache_gib is not None:
            found[_CACHE_GIB] = str(self.cache_gib)
        return found

    def engine_args(self, given: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the arguments of vLLM's command line that it asks for.

        Args:
            given: Those that the user gives; what they say of parallelism counts.

        Raises:
            InvalidRequestError: They make another number of ranks than there are cards.
        """
        if not self.gpus or _placed_elsewhere(given):
            return ()
        others = parallel_ranks(given) // _size(given, _TENSOR)
        tensor, left = divmod(len(self.gpus), others)
        wanted = flag_value(given, *_TENSOR)
        if left or (wanted is not None and int(wanted) != tensor):
            many = f"{len(self.gpus)} card{'s' * (len(self.gpus) > 1)}"
            msg = f"{many} cannot be {parallel_ranks(given)} ranks of vLLM's"
            raise InvalidRequestError(msg, field="gpus", value=",".join(self.gpus))
        return () if wanted or tensor == 1 else (_TENSOR[0], str(tensor))


def parse_gpus(text: str) -> list[Device]:
    """Parse ``0,1:2,3``: groups separated by a colon, devices of a group by a comma.

    A UUID or MIG name may stand for an index. ``0:1`` is two workers, ``0,1`` one on two devices.

    Args:
        text: As on the command line.

    Raises:
        InvalidRequestError: It names no device, or one twice, or a group that CUDA cannot have.
    """
    groups = [tuple(map(_device_name, group.split(","))) for group in text.split(":")]
    named = [name for group in groups for name in group]
    if len(set(named)) < len(named):
        msg = "names a device twice; each worker needs devices of its own"
        raise InvalidRequestError(msg, field="gpus", value=text)
    for group in groups:
        if len(group) > 1 and any(name.startswith("MIG-") for name in group):
            msg = "a process of CUDA's sees one MIG device only; give each a worker of its own"
            raise InvalidRequestError(msg, field="gpus", value=",".join(group))
        if len({name.isdigit() for name in group}) > 1:
            msg = "a group is all indices or all names: CUDA takes no mixture"
            raise InvalidRequestError(msg, field="gpus", value=",".join(group))
    return [Device(gpus=group) for group in groups]


def _device_name(text: str) -> str:
    name = text.strip()
    if not _NAMED.fullmatch(name):
        msg = "is no device; give indices or GPU-/MIG- names, such as 0,1:2,3"
        raise InvalidRequestError(msg, field="gpus", value=name)
    return str(int(name)) if name.isdigit() else name


def check_gpus(devices: Sequence[Device], cards: Sequence[Gpu] | None) -> list[Device]:
    """Compare what is asked for with the cards there are.

    Args:
        devices: From `parse_gpus`.
        cards: From `workers.hardware.gpus`; None where nobody knows.

    Returns:
        The devices, with the beginnings of UUIDs made whole: vLLM wants them whole.

    Raises:
        InvalidRequestError: A card is not here.
    """
    if cards is None:
        return list(devices)
    known = [name for card in cards for name in (str(card.index), card.uuid, *card.slices)]

    def whole(name: str) -> str:
        fitting = [other for other in known if other == name] or [
            other for other in known if not name.isdigit() and other.startswith(name)
        ]
        if len(fitting) != 1:
            reason = "is not here" if not fitting else f"may be any of {len(fitting)}"
            msg = f"{reason}; `nvidia-smi -L` lists {len(cards)} cards"
            raise InvalidRequestError(msg, field="gpus", value=name)
        return fitting[0]

    return [Device(gpus=tuple(map(whole, device.gpus))) for device in devices]


def share_cpu(ranks: Sequence[int]) -> list[Device]:
    """Divide this process' cores, and the memory that the user allows, among workers.

    Args:
        ranks: Processes that compute, by worker, as `parallel_ranks` counts them.

    Returns:
        A device each; no two share a core. One worker alone is left to vLLM.

    Raises:
        ConfigurationError: There are more processes than cores.
    """
    if len(ranks) < 2:
        return [Device() for _ in ranks]
    parts = iter(_divide(sum(ranks)))
    # What the user allows is for all of them; vLLM counts in whole GiB, and takes 0 for "half".
    allowed = os.environ.get(_CACHE_GIB)
    share = max(1, int(allowed) // len(ranks)) if allowed and allowed.isdigit() else None
    return [
        Device(cpus=tuple(next(parts) for _ in range(count)), cache_gib=share) for count in ranks
    ]


def parallel_ranks(engine_args: Sequence[str]) -> int:
    """Return how many processes of an engine compute here: tensor, pipeline and data parallel.

    Args:
        engine_args: Of vLLM's command line.

    Raises:
        InvalidRequestError: A size is no number.
    """
    ranks = 1
    for names in (_TENSOR, _PIPELINE, _CONTEXT):
        ranks *= _size(engine_args, names)
    # Of replicas over several machines, those of this one.
    here = flag_value(engine_args, *_REPLICAS_HERE) is not None
    return ranks * _size(engine_args, _REPLICAS_HERE if here else _REPLICAS)


def _placed_elsewhere(engine_args: Sequence[str]) -> bool:
    """Whether Ray, or several machines together, decide which rank runs on which card."""
    by_ray = any(flag_value(engine_args, *names) == word for names, word in _PLACING)
    return by_ray or _size(engine_args, _MACHINES) > 1


def visible_devices() -> list[str]:
    """Return what this process' own CUDA_VISIBLE_DEVICES names; empty where it is unset."""
    named = os.environ.get(_CARDS, "")
    return [name.strip() for name in named.split(",") if name.strip()]


def device_here() -> str:
    """Return the name of what this process is bound to, as `Device.name` has it."""
    if cards := visible_devices():
        return _cards_name(cards)
    bound = os.environ.get(_CPUS, "")
    if bound and bound[0].isdigit():
        return f"cpu{bound.replace('|', '+')}" if "-" in bound else f"cpu{_ranges(_ids(bound))}"
    return "cpu" if built_for_cpu() else "gpu"


def worker_name(model: str) -> str:
    """Return this worker's name: after its model, host and device, and unique among the living.

    Args:
        model: Name it serves.
    """
    return f"{model}@{socket.gethostname()}:{device_here()}:{os.getpid()}"


def built_for_cpu() -> bool:
    """Whether the installed vLLM is the build for the CPU."""
    return installed("vllm-cpu") is not None


def spare_cores() -> frozenset[int]:
    """Return the cores for what shall not slow down this process' engine on a CPU, once it runs.

    vLLM binds a thread to each core that it computes on, and the kernel would have others share
    these while a core beside them is free.

    Returns:
        Empty where no core is taken alone, as on a GPU; where cores were divided among workers,
        since what is left over may be another's; and where less is left over than is taken.
    """
    import psutil

    if os.environ.get(_CPUS, "auto") != "auto":
        return frozenset()
    taken: set[int] = set()
    for child in _children(_COMPUTING):
        with contextlib.suppress(psutil.Error):  # it ends just now
            taken.update(child.cpu_affinity())
    spare = os.sched_getaffinity(0) - taken
    return frozenset(spare) if 0 < len(taken) <= len(spare) else frozenset()


def let_engine_give_way() -> None:
    """Have this process' engine on a CPU, once it runs, leave a core to the event loop at once.

    The loop works for moments, and requests wait for it; among threads that compute all the time
    it would wait its turn. Does nothing on a GPU, where the engine's threads hardly compute.
    """
    import psutil

    if not built_for_cpu() or sys.platform != "linux":
        return  # elsewhere priority is of a process, and is not told from that of its threads
    for child in _children(_ENGINE):
        threads = []
        with contextlib.suppress(psutil.Error):  # it ends just now
            threads = child.threads()
        for thread in threads:
            with contextlib.suppress(OSError):  # it has ended, or a sandbox forbids this
                nice = os.getpriority(os.PRIO_PROCESS, thread.id)
                os.setpriority(os.PRIO_PROCESS, thread.id, nice + _NICE)


def _children(name: str) -> list[psutil.Process]:
    """Return the processes below this one that are named so."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith(name):
                found.append(child)
    return found


def _cards_name(cards: Sequence[str]) -> str:
    if all(name.isdigit() for name in cards):
        return f"gpu{'+'.join(cards)}"
    return "+".join(name[:_SHOWN_UUID].lower() for name in cards)


def _ids(bound: str) -> list[int]:
    return [int(word) for word in bound.replace("|", ",").split(",") if word.isdigit()]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ``0-2+5`` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _divide(parts: int) -> list[tuple[int, ...]]:
    cores = _cores(sorted(os.sched_getaffinity(0)))
    # As vLLM itself does: one thread a core, for two of one core only get in each other's way.
    units = [core[-1:] for core in cores]
    if parts > len(units):
        units = [(cpu,) for core in cores for cpu in core]
    if parts > len(units):
        msg = f"{parts} workers need as many cores, and there are {len(units)}"
        raise ConfigurationError(msg)
    share = len(units) // parts
    return [
        tuple(cpu for unit in units[at * share : (at + 1) * share] for cpu in unit)
        for at in range(parts)
    ]


def _cores(cpus: Sequence[int]) -> list[tuple[int, ...]]:
    """Group logical CPUs by core, in the order of sockets and cores."""
    found: dict[tuple[int, int], list[int]] = {}
    for cpu in cpus:
        topology = _TOPOLOGY / f"cpu{cpu}" / "topology"
        try:
            package, core = (
                int((topology / name).read_text(encoding="ascii"))
                for name in ("physical_package_id", "core_id")
            )
        except (OSError, ValueError):
            package, core = -1, cpu
        found.setdefault((package, core), []).append(cpu)
    return [tuple(found[place]) for place in sorted(found)]


def flag_value(words: Sequence[str], *names: str) -> str | None:
    """Return the value of a flag in a command line's words, or None; the last one counts.

    Args:
        words: As ``--flag value`` or ``--flag=value``.
        names: Ways to write the flag.
    """
    value = None
    for at, word in enumerate(words):
        name, separator, rest = word.partition("=")
        if name.replace("_", "-") in names:
            value = rest if separator else (words[at + 1] if at + 1 < len(words) else "")
    return value


def _size(words: Sequence[str], names: Sequence[str]) -> int:
    value = flag_value(words, *names)
    if value is None:
        return 1
    if not value.isdigit() or int(value) < 1:
        msg = f"{names[0]} must be a whole number, 1 or more"
        raise InvalidRequestError(msg, field="engine_args", value=value)
    return int(value)
