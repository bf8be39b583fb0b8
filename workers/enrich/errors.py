"""What can go wrong with an enhancement. None of it ever costs the caller his answer."""

from __future__ import annotations

from schema.errors import ServiceError


class EnrichmentError(ServiceError):
    """An enhancement failed on one text; trying again can help."""


class EnrichmentTimeoutError(EnrichmentError, TimeoutError):
    """An enhancement was over its time budget."""


class EnrichmentBusyError(EnrichmentError):
    """More texts wait than the configuration allows; this one was not taken."""


class EnrichmentUnavailableError(EnrichmentError):
    """The process behind an enhancement died, does not start, or was closed."""
