"""`EnhancedRequestOutput`: vLLM's `RequestOutput` with metadata."""

from __future__ import annotations

from typing import Any

from vllm.outputs import RequestOutput


class EnhancedRequestOutput(RequestOutput):
    """Everything of the native output, and how it came about.

    Attributes:
        metadata: JSON types. On every output: ``cached`` (bool) and ``provenance``
            (``generated``, ``exact``, ``semantic`` or ``coalesced``). On the final one also
            ``similarity`` and ``source_answer_id`` (of a stored answer that was served),
            ``answer_id``, ``tier`` (``memory`` or ``store``), ``nlp_result``, ``similar``
            (neighbours with scores), ``enrichments`` (of plug-ins); of the answer, where asked,
            ``answer_nlp_result`` and ``answer_enrichments``; ``processing_time`` (seconds by
            stage), ``errors`` (which enhancement failed, and why), ``late`` (which still ran, and
            will reach the store only), ``disabled`` (which were off, and why) and
            ``not_reusable`` (why this answer is not stored).
    """

    metadata: dict[str, Any]

    @classmethod
    def of(cls, native: RequestOutput, metadata: dict[str, Any]) -> EnhancedRequestOutput:
        """Return a shallow copy of a native output, with metadata.

        Args:
            native: Any output of vLLM's; left as it is.
            metadata: See the class.
        """
        # Not through __init__: fields that a newer vLLM adds must come along.
        enhanced = cls.__new__(cls)
        enhanced.__dict__.update(native.__dict__)
        enhanced.metadata = metadata
        return enhanced

    @property
    def text(self) -> str:
        """Text of the first completion; empty when there is none."""
        return self.outputs[0].text if self.outputs else ""

    def __repr__(self) -> str:
        return f"Enhanced{super().__repr__()[:-1]}, metadata={self.metadata})"
