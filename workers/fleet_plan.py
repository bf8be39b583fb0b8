"""Which workers a machine is to run: on what, with which model, with which of vLLM's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from schema.errors import ConfigurationError, InvalidRequestError
from workers import hardware
from workers.fleet_file import FleetFile, WorkersOfAModel
from workers.pinning import (
    Device,
    built_for_cpu,
    check_gpus,
    parallel_ranks,
    parse_gpus,
    share_cpu,
)

if TYPE_CHECKING:
    from workers.hardware import Gpu
    from workers.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Post:
    """What one worker is to do."""

    device: Device
    model: str | None = None  # folder or hub name; None is the settings'
    served_model_name: str | None = None  # None is the model's own, or the settings'
    engine_args: tuple[str, ...] = ()  # of vLLM's command line

    @property
    def name(self) -> str:
        """For people."""
        model = self.served_model_name or self.model
        return f"{self.device.name} ({model})" if model else self.device.name

    def settings(self, settings: Settings) -> Settings:
        """Return the settings as its worker is to read them.

        Args:
            settings: The fleet's.
        """
        if self.model is None and self.served_model_name is None:
            return settings
        # The fleet's own name is for the fleet's own model.
        own = {"model": self.model or settings.model, "served_model_name": self.served_model_name}
        return settings.model_copy(update=own)


def plan(
    *,
    gpus: str | None = None,
    workers: int | None = None,
    engine_args: Sequence[str] = (),
    file: FleetFile | None = None,
) -> list[Post]:
    """Return the workers that the command line and the file ask for.

    Args:
        gpus: As `parse_gpus` takes it; None is the CPU.
        workers: On the CPU, how many.
        engine_args: For every worker; they win over the file's.
        file: Read already.

    Raises:
        InvalidRequestError: Two of these contradict each other.
        ConfigurationError: There are more workers than cores.
    """
    file = file or FleetFile()
    if file.workers:
        if gpus is not None or workers is not None:
            msg = "the file says which workers run; leave out --gpus and --workers, or the list"
            raise InvalidRequestError(msg, field="config")
        groups = list(file.workers)
    else:
        groups = [WorkersOfAModel(gpus=gpus, count=_count(gpus, workers))]
    words = [(*file.words(group if file.workers else None), *engine_args) for group in groups]
    on_cpu = iter(
        share_cpu(
            [
                parallel_ranks(own)
                for group, own in zip(groups, words, strict=True)
                for _ in range(group.count if group.gpus is None else 0)
            ]
        )
    )
    posts = [
        Post(
            device=device,
            model=group.model,
            served_model_name=group.served_model_name,
            engine_args=(*device.engine_args(own), *own),
        )
        for group, own in zip(groups, words, strict=True)
        for device in (
            [next(on_cpu) for _ in range(group.count)]
            if group.gpus is None
            else parse_gpus(group.gpus)
        )
    ]
    _refuse_shared(posts)
    return posts


def on_this_machine(posts: Sequence[Post], cards: Sequence[Gpu] | None) -> list[Post]:
    """Compare what was planned with the machine.

    Args:
        posts: From `plan`.
        cards: From `workers.hardware.gpus`; None where nobody knows.

    Returns:
        The posts, with cards named as vLLM wants them.

    Raises:
        InvalidRequestError: A card is not here.
        ConfigurationError: The installed vLLM is the CPU's build.
    """
    wanted = [post for post in posts if post.device.gpus]
    if wanted and built_for_cpu():
        msg = "--gpus needs vLLM's build for GPUs, and the CPU's is installed: promptmill[gpu]"
        raise ConfigurationError(msg)
    return [
        Post(
            device=check_gpus([post.device], cards)[0] if post.device.gpus else post.device,
            model=post.model,
            served_model_name=post.served_model_name,
            engine_args=post.engine_args,
        )
        for post in posts
    ]


def cards_here(posts: Sequence[Post]) -> list[Gpu] | None:
    """Return the cards of this machine, if one is wanted.

    Args:
        posts: From `plan`.
    """
    return hardware.gpus() if any(post.device.gpus for post in posts) else None


def _count(gpus: str | None, workers: int | None) -> int:
    if gpus is None:
        return workers or 1
    found = len(parse_gpus(gpus))
    if workers not in (None, found):
        msg = f"{gpus!r} is {found} workers; leave the number out, or make them agree"
        raise InvalidRequestError(msg, field="workers", value=workers)
    return 1


def _refuse_shared(posts: Sequence[Post]) -> None:
    named = list(chain.from_iterable(post.device.gpus for post in posts))
    for name in named:
        if named.count(name) > 1:
            msg = "is given to two workers; each needs devices of its own"
            raise InvalidRequestError(msg, field="gpus", value=name)
