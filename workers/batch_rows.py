"""From a row of a batch file to a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from schema.errors import InvalidRequestError
from schema.openai_batch import BadLine, BatchLine
from workers.batch_order import may_share, request_digest
from workers.submission import SubmitDefaults, build_spec

if TYPE_CHECKING:
    from uuid import UUID

    from schema.jobs import JobSpec
    from workers.aio_client import AsyncJobClient
    from workers.batch_former import Redo
    from workers.connection import Connection


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a batch is run."""

    namespace: str | None = None  # tenant; None is the settings' own
    model: str | None = None  # served model; None is each row's own, if served, or the default
    resume: bool = False  # go on with what an earlier run left
    redo: Redo | None = None  # answer rows of a finished run anew: failed or truncated
    max_tokens: int | None = None  # new limit for every row
    ordered: bool = False  # lines in the order of the input
    window: int = 4096  # rows under way at most
    grouped: bool = True  # rows that begin alike run next to each other
    errors: str | None = None  # file for the rows that failed, which the output then leaves out
    schema: dict[str, Any] | None = None  # JSON schema that every generated answer must fit
    job: dict[str, Any] = field(default_factory=dict)  # further `SubmitOptions` of every row


_GENERATING = ("/v1/chat/completions", "/v1/completions")

#: Every option left to its default.
DEFAULTS = BatchOptions()


def batch_channel(batch_id: UUID) -> str:
    """Return the result channel of a batch.

    Args:
        batch_id: The batch.
    """
    return f"batch-{batch_id.hex}"


async def open_batch(
    connection: Connection, namespace: str, batch_id: UUID, source: str, **details: Any
) -> None:
    """Write the batch's own row, unless it is there or there is no database.

    Args:
        connection: Open resources.
        namespace: Tenant.
        batch_id: The batch.
        source: Name of the input file.
        details: JSON types to be kept with it.

    Raises:
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    store = connection.ledger
    if store is not None and await store.batch(namespace, batch_id) is None:
        await store.create_batch(namespace, batch_id=batch_id, source=source, details=details)


@dataclass(frozen=True, kw_only=True)
class BuiltRow:
    """The job of a row."""

    spec: JobSpec
    url: str  # path of the endpoint
    shared: bytes | None  # what it asks, where an equal row may be given the same answer


class RowBuilder:
    """Makes the jobs of one batch.

    Args:
        client: Knows the settings, and which models are served.
        options: How the batch is run.
        batch_id: The batch.
        with_rows: Whether the batch has a row in Postgres, which its jobs then name.
    """

    def __init__(
        self, client: AsyncJobClient, options: BatchOptions, batch_id: UUID, *, with_rows: bool
    ) -> None:
        self._client = client
        self._options = options
        self._batch_id = batch_id
        self._with_rows = with_rows
        self._schema = options.schema and {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": options.schema},
        }
        self._defaults = SubmitDefaults(
            namespace=options.namespace or client.settings.namespace,
            max_prompt_bytes=client.settings.max_prompt_bytes,
        )

    async def build(self, line: BatchLine) -> BuiltRow | BadLine:
        """Return the job of a row, or what is wrong with it.

        Args:
            line: The row.
        """
        body = dict(line.body)
        if self._options.max_tokens is not None and line.url in _GENERATING:
            body.pop("max_completion_tokens", None)
            body["max_tokens"] = self._options.max_tokens
        if self._schema is not None and line.url in _GENERATING:
            body["response_format"] = self._schema
        # The same row under the same batch is the same job, however often it is submitted.
        digest = request_digest(line.url, body)
        options: dict[str, Any] = {
            **self._options.job,
            "url": line.url,
            "body": body,
            "channel": batch_channel(self._batch_id),
            "custom_id": line.custom_id,
            "idempotency_key": f"{self._batch_id.hex}:{line.number}:{digest.hex()}",
            "model": self._options.model or await self._served(body.get("model")),
        }
        if self._with_rows:
            options |= {"batch_id": self._batch_id, "row": line.number - 1}
        shares = may_share(line.url, body, self._options.job.get("reuse"))
        try:
            spec = build_spec(None, options, self._defaults)
            return BuiltRow(spec=spec, url=line.url, shared=digest if shares else None)
        except InvalidRequestError as exc:
            return BadLine(
                number=line.number,
                message=f"line {line.number}: {exc}",
                custom_id=line.custom_id,
                param=exc.field,
            )

    async def _served(self, model: object) -> str | None:
        # A model that nobody is known to serve goes to the default's queue, where vLLM answers
        # that it does not exist; in a queue of its own the row would wait for ever.
        if isinstance(model, str) and model in await self._client.served_models():
            return model
        return None
