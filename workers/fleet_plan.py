"""Which workers a machine is to run: on what, with which model, with which of vLLM's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    visible_devices,
)
from workers.serving import refuse_model

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
        ConfigurationError: There are more workers than cores, or the model is an engine argument.
    """
    file = file or FleetFile()
    if file.workers:
        if gpus is not None or workers is not None:
            msg = "the file says which workers run; leave out --gpus and --workers, or the list"
            raise InvalidRequestError(msg, field="config")
        groups = list(file.workers)
    else:
        groups = [_of_the_command_line(gpus, workers)]
    words = [(*file.words(group if file.workers else None), *engine_args) for group in groups]
    for own in words:
        refuse_model(own)
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
        InvalidRequestError: A card is not here, is hidden from this process, or is given to two
            workers under two names.
        ConfigurationError: The installed vLLM is the CPU's build.
    """
    wanted = [post for post in posts if post.device.gpus]
    if wanted and built_for_cpu():
        msg = "--gpus needs vLLM's build for GPUs, and the CPU's is installed: promptmill[gpu]"
        raise ConfigurationError(msg)
    found = [
        replace(post, device=check_gpus([post.device], cards)[0]) if post.device.gpus else post
        for post in posts
    ]
    named = [name for post in found for name in post.device.gpus]
    _refuse_one_card_twice(named, cards or ())
    _refuse_hidden(named, cards or ())
    return found


def cards_here(posts: Sequence[Post]) -> list[Gpu] | None:
    """Return the cards of this machine, if one is wanted.

    Args:
        posts: From `plan`.
    """
    return hardware.gpus() if any(post.device.gpus for post in posts) else None


def _of_the_command_line(gpus: str | None, workers: int | None) -> WorkersOfAModel:
    if gpus is None:
        return WorkersOfAModel(count=workers or 1)
    found = len(parse_gpus(gpus))
    if workers not in (None, found):
        msg = f"{gpus!r} is {found} workers; leave the number out, or make them agree"
        raise InvalidRequestError(msg, field="workers", value=workers)
    return WorkersOfAModel(gpus=gpus)


_SHARED = "is given to two workers; each needs devices of its own"


def _refuse_shared(posts: Sequence[Post]) -> None:
    named = list(chain.from_iterable(post.device.gpus for post in posts))
    for name in named:
        if named.count(name) > 1:
            raise InvalidRequestError(_SHARED, field="gpus", value=name)


def _refuse_one_card_twice(named: Sequence[str], cards: Sequence[Gpu]) -> None:
    """Refuse two names of one card, unless they are two parts of it."""
    taken: dict[int, list[str]] = {}
    for name in named:
        card = next((card for card in cards if card.answers_to(name)), None)
        if card is None:
            continue
        before = taken.setdefault(card.index, [])
        for other in before:
            if name == other or not (name.startswith("MIG-") and other.startswith("MIG-")):
                msg = f"is the card that {other} is too; each worker needs devices of its own"
                raise InvalidRequestError(msg, field="gpus", value=name)
        before.append(name)


def _refuse_hidden(named: Sequence[str], cards: Sequence[Gpu]) -> None:
    """Refuse cards that whoever started this process keeps from it, as a scheduler does."""
    if not (visible := visible_devices()):
        return
    ours = [card for card in cards if any(card.answers_to(name) for name in visible)]
    for name in named:
        hidden = any(card.answers_to(name) for card in cards if card not in ours)
        if ours and hidden:
            msg = (
                f"is not among CUDA_VISIBLE_DEVICES={','.join(visible)}; name one of those, or "
                "unset it"
            )
            raise InvalidRequestError(msg, field="gpus", value=name)
