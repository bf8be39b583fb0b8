"""From the short form, ``EnhancedAsyncLLM(model="…")``, to vLLM's own arguments."""

from __future__ import annotations

import inspect
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor

_INIT_PARAMETERS = frozenset(inspect.signature(AsyncLLM.__init__).parameters) - {"self"}


def native_arguments(model: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `AsyncLLM` for a model by name.

    Args:
        model: Name or folder.
        kwargs: Those of `AsyncLLM` and of `AsyncEngineArgs`, mixed.
    """
    own = {name: value for name, value in kwargs.items() if name in _INIT_PARAMETERS}
    rest = {name: value for name, value in kwargs.items() if name not in _INIT_PARAMETERS}
    engine_args = AsyncEngineArgs(model=model, **rest)
    context = own.setdefault("usage_context", UsageContext.ENGINE_CONTEXT)
    config = engine_args.create_engine_config(context)
    own.setdefault("vllm_config", config)
    own.setdefault("executor_class", Executor.get_class(config))
    own.setdefault("log_stats", not engine_args.disable_log_stats)
    own.setdefault("log_requests", engine_args.enable_log_requests)
    return own


class Signature:
    """Arguments of `AsyncLLM.add_request` by name, as the installed version has them."""

    def __init__(self) -> None:
        self.signature = inspect.signature(AsyncLLM.add_request)
        self._names = tuple(self.signature.parameters)[1:]
        self._known = frozenset(self._names)
        self._needed = frozenset(
            name
            for name in self._names
            if self.signature.parameters[name].default is inspect.Parameter.empty
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of one call by name.

        Args:
            args: Without self.
            kwargs: By name.

        Raises:
            TypeError: As Python raises it for a call that does not fit.
        """
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        whole = len(call) == len(args) + len(kwargs)
        if not (whole and self._needed <= call.keys() <= self._known):
            # `Signature.bind` takes longer than all else of a hit, so it only words the errors.
            self.signature.bind(None, *args, **kwargs)
        return call
