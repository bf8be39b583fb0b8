"""GPTCache's side of `against_gptcache`; run by its own interpreter, in an environment of its own.

Reads ``{"model", "stored", "asked"}`` as JSON from standard input, and prints the milliseconds of
each hit and of the embedding alone.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

from gptcache import Cache, Config
from gptcache.adapter.api import get, put
from gptcache.embedding import SBERT
from gptcache.manager import CacheBase, VectorBase, get_data_manager
from gptcache.processor.pre import get_prompt
from gptcache.similarity_evaluation import SearchDistanceEvaluation


def main() -> None:
    """Store, ask, print."""
    given = json.load(sys.stdin)
    encoder = SBERT(given["model"])
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache()
        cache.init(
            pre_embedding_func=get_prompt,
            embedding_func=encoder.to_embeddings,
            data_manager=get_data_manager(
                CacheBase("sqlite", sql_url=f"sqlite:///{folder}/cache.db"),
                VectorBase("faiss", dimension=encoder.dimension, index_path=f"{folder}/faiss"),
            ),
            similarity_evaluation=SearchDistanceEvaluation(),
            config=Config(similarity_threshold=0.8),
        )
        for prompt in given["stored"]:
            put(prompt, prompt, cache_obj=cache)
        for prompt in given["asked"][:20]:
            get(prompt, cache_obj=cache)  # warm
        hits, embedding = [], []
        for prompt in given["asked"]:
            started = time.perf_counter()
            answer = get(prompt, cache_obj=cache)
            took = time.perf_counter() - started
            if answer is not None:
                hits.append(took * 1e3)
            started = time.perf_counter()
            encoder.to_embeddings(prompt)
            embedding.append((time.perf_counter() - started) * 1e3)
        print(json.dumps({"hits_ms": hits, "embedding_ms": embedding}))
        sys.stdout.flush()
        os._exit(0)  # what it registers at exit writes into the folder that is gone by then


if __name__ == "__main__":
    main()
