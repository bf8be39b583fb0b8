"""Where spans are sent: a collector of OpenTelemetry's, for this process and for vLLM's."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from schema.errors import ConfigurationError

_NAME = "promptmill"
_TRACES_PATH = "/v1/traces"


def vllm_otlp(endpoint: str) -> tuple[str, str]:
    """Return the address and the protocol that vLLM's own exporter takes.

    Args:
        endpoint: As in the settings.

    Raises:
        ConfigurationError: It cannot be used.
    """
    parts = urlsplit(endpoint)
    if parts.scheme == "grpc" and parts.netloc:
        return f"http://{parts.netloc}", "grpc"
    if parts.scheme in {"http", "https"} and parts.netloc:
        path = parts.path if parts.path not in {"", "/"} else _TRACES_PATH
        return f"{parts.scheme}://{parts.netloc}{path}", "http/protobuf"
    msg = "PROMPTMILL_OTLP_ENDPOINT must be such as http://host:4318 or grpc://host:4317"
    raise ConfigurationError(msg)


def provided() -> bool:
    """Whether this process has a tracer provider of its own or of its host's."""
    from opentelemetry import trace

    return not isinstance(
        trace.get_tracer_provider(), (trace.ProxyTracerProvider, trace.NoOpTracerProvider)
    )


def provide(endpoint: str) -> None:
    """Give this process a tracer provider that exports in the background.

    Args:
        endpoint: As in the settings.

    Raises:
        ConfigurationError: It cannot be used.
        ImportError: OpenTelemetry is not installed.
    """
    address, protocol = vllm_otlp(endpoint)
    from opentelemetry import trace
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    told = OTELResourceDetector().detect()
    resource = Resource.create({SERVICE_NAME: told.attributes.get(SERVICE_NAME, _NAME)})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_exporter(address, protocol)))
    trace.set_tracer_provider(provider)


def _exporter(address: str, protocol: str) -> Any:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter(endpoint=address, insecure=True)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
        OTLPSpanExporter as HttpExporter,
    )

    return HttpExporter(endpoint=address)
