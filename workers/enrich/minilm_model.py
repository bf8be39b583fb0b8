"""The embedding model inside its child process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class MiniLmModel:
    """A sentence-transformers model on one CPU thread.

    Args:
        path: Folder of the model, or its name on the model hub.
    """

    def __init__(self, path: str) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(1)
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model = SentenceTransformer(path, device="cpu")
        list(self(["warm"]))  # the first call costs ten times a later one

    def __call__(self, texts: Sequence[str]) -> Iterator[bytes]:
        """Embed texts.

        Args:
            texts: Each is cut by the model's tokenizer at its own limit (256 tokens for MiniLM).

        Yields:
            For each text a unit vector, raw float32 in this machine's byte order.
        """
        # Half a surrogate pair stops the tokenizer.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        # What `encode` does, without the sixth of its time that it spends around the model.
        with self._torch.inference_mode():
            vectors = self._model(self._model.preprocess(clean))["sentence_embedding"]
            vectors = self._torch.nn.functional.normalize(vectors, dim=1).float()
        for vector in vectors.numpy():
            yield vector.tobytes()
