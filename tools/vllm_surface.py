"""Prints what a vLLM offers of that which the engine relies on, read from its source as text.

``python tools/vllm_surface.py WHEEL_OR_FOLDER > tests/fixtures/vllm-VERSION.json``

Nothing is installed or imported, so that a build for other machines (the GPU wheel, on a machine
without a GPU) can be held against the contract test too. FOLDER is the one that holds `vllm/`.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

#: Classes whose attributes the engine uses.
CLASSES = (
    ("vllm.v1.engine.async_llm", "AsyncLLM"),
    ("vllm.v1.engine.output_processor", "RequestOutputCollector"),
    ("vllm.outputs", "RequestOutput"),
    ("vllm.outputs", "CompletionOutput"),
    ("vllm.outputs", "PoolingRequestOutput"),
    ("vllm.outputs", "PoolingOutput"),
    ("vllm.logprobs", "Logprob"),
    ("vllm.lora.request", "LoRARequest"),
    ("vllm.sampling_params", "SamplingParams"),
    ("vllm.sampling_params", "StructuredOutputsParams"),
    ("vllm.pooling_params", "PoolingParams"),
    ("vllm.renderers.base", "BaseRenderer"),
    ("vllm.config.vllm", "VllmConfig"),
    ("vllm.config.cache", "CacheConfig"),
    ("vllm.config.speculative", "SpeculativeConfig"),
    ("vllm.config.model", "ModelConfig"),
    ("vllm.config.multimodal", "MultiModalConfig"),
)

#: Functions that the engine calls or overrides, whose arguments therefore count.
FUNCTIONS = (
    ("AsyncLLM", "__init__"),
    ("AsyncLLM", "add_request"),
    ("AsyncLLM", "abort"),
    ("AsyncLLM", "shutdown"),
    ("AsyncLLM", "generate"),
    ("AsyncLLM", "encode"),
    ("AsyncLLM", "from_engine_args"),
    ("AsyncLLM", "from_vllm_config"),
    ("RequestOutputCollector", "__init__"),
    ("RequestOutput", "__init__"),
    ("PoolingRequestOutput", "__init__"),
    ("BaseRenderer", "render_cmpl"),
    ("BaseRenderer", "render_cmpl_async"),
)


class Source:
    """A vLLM's Python files.

    Args:
        path: A wheel, or a folder that holds ``vllm/``.
    """

    def __init__(self, path: Path) -> None:
        self._wheel = zipfile.ZipFile(path) if path.is_file() else None
        self._folder = path
        self.module = cache(self._module)

    def names(self, module: str) -> set[str]:
        """Return what a module defines or imports at its top, lazy attributes included."""
        found: set[str] = set()
        waiting: list[ast.AST] = [*self.module(module).body]
        while waiting:
            node = waiting.pop()
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(node.name)  # and not what is inside
                continue
            waiting.extend(ast.iter_child_nodes(node))
            if isinstance(node, ast.alias):
                found.add(node.asname or node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Dict):
                found |= {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}
        return {name for name in found if name.isidentifier() and not name.startswith("_")}

    def lines(self, module: str, name: str) -> list[ast.ClassDef]:
        """Return a class and those it inherits from, as far as they are vLLM's own."""
        tree = self.module(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                bases = [base for base in map(_name_of, node.bases) if base]
                return [node, *(one for base in bases for one in self.lines(module, base))]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.lines(str(node.module), alias.name)
        return []

    def _module(self, module: str) -> ast.Module:
        inside = module.replace(".", "/")
        for path in (f"{inside}.py", f"{inside}/__init__.py"):
            text = self._read(path)
            if text is not None:
                return ast.parse(text)
        return ast.Module(body=[], type_ignores=[])

    def _read(self, path: str) -> str | None:
        if self._wheel is None:
            file = self._folder / path
            return file.read_text() if file.is_file() else None
        try:
            return self._wheel.read(path).decode()
        except KeyError:
            return None

    def version(self) -> str:
        """Return the version of the distribution that the files belong to."""
        if self._wheel is not None:
            return Path(str(self._wheel.filename)).name.split("-")[1]
        text = self._read("vllm/_version.py") or ""
        for node in ast.walk(ast.parse(text)):
            value = node.value if isinstance(node, ast.Assign) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
        return "unknown"


def _name_of(base: ast.expr) -> str | None:
    if isinstance(base, ast.Subscript):
        base = base.value
    return base.id if isinstance(base, ast.Name) else None


def attributes(lines: list[ast.ClassDef]) -> set[str]:
    """Return what instances of a class carry, whichever way the class says so.

    Args:
        lines: The class and those it inherits from.
    """
    found: set[str] = set()
    for line in lines:
        for node in line.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
        for inner in ast.walk(line):
            if (
                isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            ):
                found.add(inner.attr)
    return found


def arguments(lines: list[ast.ClassDef], method: str) -> list[str]:
    """Return the names of a method's arguments, without the first.

    Args:
        lines: The class and those it inherits from.
        method: Its name.
    """
    for line in lines:
        for node in line.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == method:
                args = node.args
                return [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)][1:]
    return []


def imported() -> Iterator[tuple[str, str]]:
    """Yield module and name of everything that our code imports from vLLM."""
    found = set()
    for path in (ROOT / "workers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(str(node.module), alias.name) for alias in node.names}
    yield from sorted(found)


def surface(path: Path) -> dict[str, Any]:
    """Return what a vLLM offers of what the engine relies on: names, parted by blanks.

    Args:
        path: A wheel, or a folder that holds ``vllm/``.
    """
    source = Source(path)
    modules = {module for module, _ in imported()}
    classes = {name: source.lines(module, name) for module, name in CLASSES}
    return {
        "version": source.version(),
        "modules": {module: " ".join(sorted(source.names(module))) for module in sorted(modules)},
        "classes": {name: " ".join(sorted(attributes(lines))) for name, lines in classes.items()},
        "arguments": {
            f"{cls}.{method}": " ".join(arguments(classes[cls], method))
            for cls, method in FUNCTIONS
        },
    }


if __name__ == "__main__":
    print(json.dumps(surface(Path(sys.argv[1])), indent=1))
