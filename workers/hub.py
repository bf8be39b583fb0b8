"""Fetching a model from the model hub before a worker starts, with a progress bar.

vLLM would fetch it too, inside a worker, where nobody sees how far it is or what went wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from schema.errors import ConfigurationError, StackError
from workers.pinning import flag_value

#: What a worker may need of a repository, whichever tokenizer it has.
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
#: Formats of weights, the best one first; only that one is fetched.
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
#: Copies of the weights in the layout of whoever trained the model.
_NEVER = ("original/**", "metal/**")
_ASK_S = 10.0
_PROXY = "where a proxy is needed, set HTTPS_PROXY; a mirror goes into HF_ENDPOINT"


def is_folder(model: str) -> bool:
    """Whether a model's name means a folder here rather than a repository on the hub.

    Args:
        model: As given to ``--model``.
    """
    return model.startswith(("/", ".", "~")) or Path(model).is_dir()


def revision_of(engine_args: Sequence[str]) -> str | None:
    """Return the revision that vLLM's arguments name, or None.

    Args:
        engine_args: Of its command line.
    """
    return flag_value(engine_args, "--revision")


def cached(model: str, *, revision: str | None = None) -> Path | None:
    """Return the folder of a model that was fetched before, or None.

    Args:
        model: Name on the hub.
        revision: Branch, tag or commit; None is the newest known.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    folder = Path(found).parent if isinstance(found, str) else None
    if folder and any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return folder
    return None


def fetch(model: str, *, revision: str | None = None) -> Path:
    """Fetch what is missing of a model; a bar on standard error shows how far it is.

    Args:
        model: Name on the hub, such as ``Qwen/Qwen3-0.6B``.
        revision: Branch, tag or commit; None is the newest.

    Returns:
        Its folder in the hub's cache (``HF_HOME``).

    Raises:
        ConfigurationError: There is no such model, or it may not be read; the message says what to
            do.
        StackError: The hub cannot be reached, and the model was not fetched before.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        wanted = [*_SMALL, _weights_of(model, revision)]
        found = snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=list(_NEVER)
        )
    except errors.HFValidationError:
        msg = f"{model!r} is neither a folder here nor a name on the model hub (owner/name)"
        raise ConfigurationError(msg) from None
    except errors.GatedRepoError as exc:
        msg = (
            f"{model} asks for its terms to be accepted: do so on its page, and set HF_TOKEN (or "
            "run `hf auth login`)"
        )
        raise ConfigurationError(msg) from exc
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        at = f" at revision {revision}" if revision else ""
        msg = (
            f"the model hub has no {model}{at}, or shows it to its owner only; look at the "
            "spelling, or set HF_TOKEN"
        )
        raise ConfigurationError(msg) from exc
    except OSError as exc:
        if (kept := cached(model, revision=revision)) is not None:
            return kept
        raise _unreachable(model, exc) from exc
    except Exception as exc:
        # The hub's HTTP library is not ours to name, and it changes; its errors have no other root.
        if type(exc).__module__.partition(".")[0] not in {"httpx", "httpx2", "huggingface_hub"}:
            raise
        if (kept := cached(model, revision=revision)) is not None:
            return kept
        raise _unreachable(model, exc) from exc
    return Path(found)


def _weights_of(model: str, revision: str | None) -> str:
    """Return the pattern of the best format that the repository has."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    # Not the listing of its files, which is asked for again and again for half a minute.
    info = HfApi().model_info(model, revision=revision, timeout=_ASK_S)
    files = [file.rfilename for file in info.siblings or ()]
    for pattern in _WEIGHTS:
        if any(fnmatch(file, pattern) for file in files):
            return pattern
    msg = f"{model} holds no weights that vLLM reads ({', '.join(_WEIGHTS)})"
    raise ConfigurationError(msg)


def _unreachable(model: str, exc: Exception) -> StackError:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE or isinstance(exc, OfflineModeIsEnabled):
        return StackError(
            f"{model} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset that, or "
            "give --model a folder"
        )
    reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return StackError(
        f"the model hub at {constants.ENDPOINT} cannot be reached ({reason}), and {model} was not "
        f"fetched before; {_PROXY}; or give --model a folder, or nothing for the bundled model"
    )
