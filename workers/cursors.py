"""Places in a Redis Stream."""

from __future__ import annotations

from schema.errors import InvalidRequestError

#: Before the first entry of any stream.
START = "0-0"


def checked_cursor(cursor: str) -> str:
    """Return the cursor, refusing what is not a position in a stream.

    Raises:
        InvalidRequestError: It is not one.
    """
    head, _, tail = cursor.partition("-")
    if not head.isdigit() or (tail and not tail.isdigit()):
        msg = f"is not a stream position such as {START}"
        raise InvalidRequestError(msg, field="cursor", value=cursor)
    return cursor
