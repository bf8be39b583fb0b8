"""What the parts of `JobStore` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from workers.store.database import Database


class StorePart:
    """One side of the job store.

    Args:
        database: Where the jobs live.
    """

    def __init__(self, database: Database) -> None:
        self._database = database


def pairs(held: Mapping[UUID, int]) -> dict[str, list[UUID] | list[int]]:
    """Return jobs and tokens as the two arrays that a statement takes.

    Args:
        held: Fencing token by job.

    Returns:
        Bound parameters ``ids`` and ``tokens``.
    """
    return {"ids": list(held), "tokens": list(held.values())}
