"""The enhanced engine: vLLM's `AsyncLLM` with reuse, coalescing and enrichment.

Knows nothing of Celery or of SQL, so it also serves as a library. Names are loaded when they are
first used, since importing vLLM takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schema.jobs import Reuse
    from workers.engine.collector import EnhancedRequestOutputCollector
    from workers.engine.config import HandlerConfig
    from workers.engine.llm import EnhancedAsyncLLM
    from workers.engine.output import EnhancedRequestOutput
    from workers.engine.parts import Parts
    from workers.engine.scope import RequestScope

__all__ = [
    "EnhancedAsyncLLM",
    "EnhancedRequestOutput",
    "EnhancedRequestOutputCollector",
    "HandlerConfig",
    "Parts",
    "RequestScope",
    "Reuse",
]

_HOMES = {
    "EnhancedAsyncLLM": "workers.engine.llm",
    "EnhancedRequestOutput": "workers.engine.output",
    "EnhancedRequestOutputCollector": "workers.engine.collector",
    "HandlerConfig": "workers.engine.config",
    "Parts": "workers.engine.parts",
    "RequestScope": "workers.engine.scope",
    "Reuse": "schema.jobs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)
