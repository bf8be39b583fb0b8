"""Which model a worker serves, and with which of vLLM's arguments."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schema.errors import ConfigurationError
from schema.names import is_name
from workers.endpoints import BUNDLED, served_name
from workers.otlp import vllm_otlp
from workers.pinning import built_for_cpu, flag_value

if TYPE_CHECKING:
    from workers.settings import Settings

#: What the bundled model can use; more would cost memory for nothing.
_BUNDLED_ARGUMENTS = ("--max-model-len", "4096")
#: By these a user says himself whether the model is compiled.
_COMPILING = (
    *("--enforce-eager", "--no-enforce-eager", "--compilation-config", "-cc"),
    *("--optimization-level", "-O", "-O0", "-O1", "-O2", "-O3"),
)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as one worker serves it."""

    name: str  # jobs ask for it by this name; names a queue
    path: str  # folder or name on the model hub
    engine_args: tuple[str, ...] = ()  # of vLLM's command line, without the two above
    aliases: tuple[str, ...] = ()  # further names of the model
    adapters: tuple[str, ...] = ()  # names of the LoRA modules of the command line

    @property
    def others(self) -> tuple[str, ...]:
        """What jobs may ask for beside the name."""
        return (*self.aliases, *self.adapters)

    @property
    def names(self) -> tuple[str, ...]:
        """What jobs may ask for; each names a queue."""
        return (self.name, *self.others)


def served_model(settings: Settings, *, engine_args: Sequence[str] = ()) -> ServedModel:
    """Return the model that the settings name, or the bundled one.

    Args:
        settings: Read from the environment and the command line.
        engine_args: Further arguments of vLLM's command line.

    Raises:
        ConfigurationError: A name cannot be used, or the bundled model is not installed.
    """
    name = served_name(settings)
    aliases, given = _parted(engine_args, "--served-model-name")
    if settings.model is not None and name is not None:
        path, own = settings.model, _cpu_arguments(given)
    else:
        from workers.bundled import bundled_model

        name, path = name or BUNDLED, str(bundled_model(settings.cache_dir))
        own = (*_BUNDLED_ARGUMENTS, *_cpu_arguments(given))
    modules, _ = _parted(given, "--lora-modules")
    served = ServedModel(
        name=name,
        path=path,
        engine_args=(*own, *given),
        aliases=tuple(alias for alias in dict.fromkeys(aliases) if alias != name),
        adapters=tuple(map(_adapter_name, modules)),
    )
    for other in served.others:
        if not is_name(other) or served.names.count(other) > 1:
            msg = f"{other!r} cannot name an adapter or a model; give a short name of its own"
            raise ConfigurationError(msg)
    return served


def _parted(words: Sequence[str], flag: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the values of a flag that takes several, and the words without flag and values."""
    values: list[str] = []
    others: list[str] = []
    inside = False
    for word in words:
        name, separator, value = word.partition("=")
        if word.startswith("-"):
            inside = name.replace("_", "-") == flag
            if inside:
                values += [value] * bool(separator)
                continue
        (values if inside else others).append(word)
    return tuple(values), tuple(others)


def _adapter_name(module: str) -> str:
    if not module.startswith("{"):
        return module.partition("=")[0]
    try:
        return str(json.loads(module)["name"])
    except (ValueError, KeyError) as exc:
        msg = f"--lora-modules: {module} is not JSON with a name and a path"
        raise ConfigurationError(msg) from exc


def engine_words(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return engine arguments as words of vLLM's command line.

    Args:
        arguments: By name, with ``_`` or ``-``. True is a flag alone, False its ``--no-`` form, a
            list several words, a mapping JSON; None leaves vLLM its default.
    """
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.strip().lstrip("-").replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            each = (json.dumps(one) if isinstance(one, Mapping) else str(one) for one in value)
            words += [f"--{flag}", *each]
        elif isinstance(value, Mapping):
            words += [f"--{flag}", json.dumps(value)]
        else:
            words += [f"--{flag}", str(value)]
    return tuple(words)


def _cpu_arguments(given: Sequence[str]) -> tuple[str, ...]:
    """Return what the CPU build needs beside the user's own words.

    Compiled for the CPU in bfloat16, vLLM 0.32 gives other answers than the model's: the bundled
    one says the capital of France is "L'Étoile". Uncompiled it is right, 5 % slower, and up in a
    third of the time.
    """
    if not built_for_cpu() or flag_value(given, *_COMPILING) is not None:
        return ()
    return ("--enforce-eager",)


def vllm_arguments(model: ServedModel, *, otlp_endpoint: str | None = None) -> Namespace:
    """Parse the arguments with vLLM's own parser, as its API server does.

    Args:
        model: What is served.
        otlp_endpoint: Collector that vLLM's spans go to, as in the settings; None makes none.

    Raises:
        ConfigurationError: vLLM does not know an argument or its value.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:  # up to vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    words = ["--model", model.path, "--served-model-name", model.name, *model.aliases]
    words += model.engine_args
    if otlp_endpoint is not None:
        address, protocol = vllm_otlp(otlp_endpoint)
        words += ["--otlp-traces-endpoint", address]
        # vLLM's processes take the address from the command line and the protocol from here.
        os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    try:
        args: Namespace = parser.parse_args(words)
    except SystemExit as exc:
        msg = f"vLLM does not take these engine arguments: {' '.join(model.engine_args)}"
        raise ConfigurationError(msg) from exc
    return args


def prepare_environment() -> None:
    """Set what vLLM reads from the environment, unless the user has set it.

    To be called before vLLM is imported.
    """
    # No reports to others, and on a CPU a key-value cache that leaves room for everything else.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
