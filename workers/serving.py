"""Which model a worker serves, and with which of vLLM's arguments."""

from __future__ import annotations

import contextlib
import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from schema.errors import ConfigurationError, InvalidRequestError
from schema.names import is_name
from schema.refusal import did_you_mean
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
    refuse_model(engine_args)
    name = served_name(settings)
    aliases, given = _parted(engine_args, "--served-model-name")
    if settings.model is not None and name is not None:
        path, own = _expanded(settings.model), _cpu_arguments(given)
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


def _expanded(model: str) -> str:
    """Return a folder as vLLM finds it, which knows no ``~``; a name of the hub as it is."""
    return str(Path(model).expanduser()) if model.startswith("~") else model


def refuse_model(engine_args: Sequence[str]) -> None:
    """Refuse a model among the engine arguments: its jobs would ask for it by another's name.

    Args:
        engine_args: Of vLLM's command line.

    Raises:
        ConfigurationError: One is there.
    """
    if (model := flag_value(engine_args, "--model")) is not None:
        msg = (
            f"the model is no engine argument; give it as --model {model}, or in the file as model"
        )
        raise ConfigurationError(msg)


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

    Raises:
        InvalidRequestError: One has no name.
    """
    words: list[str] = []
    for name, value in arguments.items():
        # What follows a dot is a key of vLLM's, which may hold an underscore.
        first, dot, rest = name.strip().lstrip("-").partition(".")
        flag = first.replace("_", "-") + dot + rest
        if not flag:
            raise InvalidRequestError("has no name", field="engine_args", value=f"{name}={value}")
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


def named_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Read engine arguments as they stand on our command line.

    Args:
        given: ``name=value`` each; ``name`` alone is true. ``true``, ``false``, ``null`` and lists
            are JSON, everything else is text. What is given again adds to a list.

    Returns:
        Arguments as `engine_words` takes them.
    """
    found: dict[str, list[Any]] = {}
    for text in given:
        name, separator, value = text.partition("=")
        values = found.setdefault(name.strip().lstrip("-").replace("-", "_"), [])
        for one in _values(value) if separator else (True,):
            if one not in values:
                values.append(one)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _values(text: str) -> list[Any]:
    if text.lower() in {"true", "false", "null"}:
        return [json.loads(text.lower())]
    if text.startswith("["):
        with contextlib.suppress(ValueError):
            return list(json.loads(text))
    return [text]


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

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            # By itself it prints all of vLLM's arguments, and the words that matter after them.
            raise ConfigurationError(f"vLLM does not take this: {message}{_nearest(self, message)}")

    # A beginning of a name would be understood by vLLM, but not by what reads the words here.
    parser = make_arg_parser(Parser(prog="vllm", allow_abbrev=False))
    words = ["--model", model.path, *model.engine_args]
    words += ["--served-model-name", model.name, *model.aliases]
    if otlp_endpoint is not None:
        address, protocol = vllm_otlp(otlp_endpoint)
        words += ["--otlp-traces-endpoint", address]
        # vLLM's processes take the address from the command line and the protocol from here.
        os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    switches = {f"--no-{name[2:]}" for name in _option_names(parser, "_StoreTrueAction")}
    try:
        # What is off unless switched on has no word for being off.
        args: Namespace = parser.parse_args([word for word in words if word not in switches])
    except SystemExit as exc:  # what it was asked for is not to serve, such as --help
        msg = f"vLLM does not serve with these arguments: {' '.join(model.engine_args)}"
        raise ConfigurationError(msg) from exc
    if (stray := getattr(args, "model_tag", None)) is not None:
        raise ConfigurationError(f"vLLM has no use for {stray!r}; its arguments begin with --")
    return args


def _nearest(parser: ArgumentParser, message: str) -> str:
    """Return hints at what the unknown words of a parser's message may have meant."""
    _, _, unknown = message.partition("unrecognized arguments: ")
    known = _option_names(parser)
    flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")]
    return "".join(did_you_mean(flag, known) for flag in flags)


def _option_names(parser: ArgumentParser, kind: str = "") -> list[str]:
    return [
        name
        for action in parser._actions  # noqa: SLF001  there is no other list of them
        if not kind or type(action).__name__ == kind
        for name in action.option_strings
    ]


def prepare_environment(*, log_format: str = "console") -> None:
    """Set what vLLM reads from the environment, unless the user has set it.

    To be called before vLLM is imported.

    Args:
        log_format: As in the settings; ``json`` is for the lines of vLLM's processes too.
    """
    if log_format == "json":
        path = Path(__file__).with_name("vllm_logging.json")
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(path))
    # No reports to others, and on a CPU a key-value cache that leaves room for everything else.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
