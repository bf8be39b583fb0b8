"""What people said of decisions on reuse, and the rates that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import text

from schema.errors import InvalidRequestError
from workers.store.part import StorePart

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

Label = Literal["right", "wrong"]
LABELS: tuple[Label, ...] = ("right", "wrong")

_LABEL_DECISION = text(
    "UPDATE reuse_decisions SET label = :label WHERE namespace = :namespace AND id = :id"
)

_LABEL_ANSWER = text(
    """
    UPDATE reuse_decisions SET label = :label
    WHERE namespace = :namespace AND answer_id = :id AND served
    """
)

_HITS = text(
    """
    SELECT provenance, count(*) AS jobs FROM jobs
    WHERE namespace = :namespace AND provenance IS NOT NULL
    GROUP BY provenance ORDER BY provenance
    """
)

# What was only played through in shadow mode is kept apart: nobody was given it.
_COUNTS = text(
    """
    SELECT count(*) FILTER (WHERE served AND NOT shadow) AS served,
           count(*) FILTER (WHERE NOT served AND NOT shadow) AS refused,
           count(*) FILTER (WHERE served AND shadow) AS shadow_would_serve,
           count(*) FILTER (WHERE NOT served AND shadow) AS shadow_would_refuse,
           count(agreement) FILTER (WHERE shadow) AS compared,
           avg(agreement) FILTER (WHERE shadow) AS agreement,
           count(*) FILTER (WHERE served AND NOT shadow AND label = 'right') AS labelled_right,
           count(*) FILTER (WHERE served AND NOT shadow AND label = 'wrong') AS labelled_wrong
    FROM reuse_decisions WHERE namespace = :namespace
    """
)

_BY_RULE = text(
    """
    SELECT coalesce(rule, 'unnamed') AS rule, count(*) AS refused FROM reuse_decisions
    WHERE namespace = :namespace AND NOT served AND NOT shadow
    GROUP BY 1 ORDER BY 2 DESC, 1
    """
)

_LATEST = text(
    """
    SELECT id, request_id, answer_id, similarity, served, shadow, rule, agreement, label,
           created_at
    FROM reuse_decisions
    WHERE namespace = :namespace AND (NOT :served_only OR served)
    ORDER BY created_at DESC, id DESC LIMIT :limit
    """
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionRecord:
    """One decision as it was recorded."""

    id: UUID
    request_id: str  # of the request that asked
    answer_id: UUID  # the stored answer that was considered
    similarity: float  # cosine of the two prompts
    served: bool  # in shadow mode: would have been
    shadow: bool
    rule: str | None  # the guard's rule that refused
    agreement: float | None  # likeness of both answers, in shadow mode
    label: Label | None  # what a person said of the decision
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class ReuseReport:
    """How reuse went in a namespace."""

    hits_by_kind: dict[str, int]  # jobs by how their answer came about
    served: int  # decisions for a neighbour
    refused: int  # decisions against one
    refused_by_rule: dict[str, int]
    shadow_would_serve: int
    shadow_would_refuse: int
    compared: int  # pairs of answers compared in shadow mode
    agreement: float | None  # mean likeness of those pairs; it is not correctness
    labelled_right: int  # served decisions that people called right
    labelled_wrong: int
    wrong_rate: float | None  # share of the labelled that are wrong; None without labels
    wrong_rate_low: float | None  # 95 % interval of E. B. Wilson
    wrong_rate_high: float | None


class ReuseLabels(StorePart):
    """Labels decisions on reuse, and counts them."""

    async def label(self, namespace: str, which: UUID, label: Label) -> int:
        """Say whether a decision was right.

        Args:
            namespace: Tenant.
            which: A decision, or an answer: then every decision that served it.
            label: ``right`` or ``wrong``. The last word counts.

        Returns:
            How many decisions bear the label now; 0 when the namespace has no such thing.

        Raises:
            InvalidRequestError: There is no such label.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        if label not in LABELS:
            msg = f"must be one of {', '.join(LABELS)}"
            raise InvalidRequestError(msg, field="label", value=label)
        values = {"namespace": namespace, "id": which, "label": label}
        async with self._database.connection() as connection:
            one = (await connection.execute(_LABEL_DECISION, values)).rowcount
            return one or (await connection.execute(_LABEL_ANSWER, values)).rowcount

    async def decisions(
        self, namespace: str, *, limit: int = 50, served_only: bool = False
    ) -> list[DecisionRecord]:
        """Return decisions, newest first.

        Args:
            namespace: Tenant.
            limit: How many at most.
            served_only: Only those for a neighbour.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "limit": limit, "served_only": served_only}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_LATEST, values)).mappings().all()
        return [DecisionRecord(**row) for row in rows]

    async def reuse_report(self, namespace: str) -> ReuseReport:
        """Return how reuse went.

        The rate of wrong reuse comes from people's labels alone. They are no random sample, and
        whoever reports a bad answer is likelier to speak up than whoever got a good one.

        Args:
            namespace: Tenant.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        asked = {"namespace": namespace}
        async with self._database.connection() as connection:
            hits = (await connection.execute(_HITS, asked)).all()
            counted: dict[str, Any] = dict(
                (await connection.execute(_COUNTS, asked)).mappings().one()
            )
            rules = (await connection.execute(_BY_RULE, asked)).all()
        wrong = counted["labelled_wrong"]
        labelled = wrong + counted["labelled_right"]
        low, high = wilson(wrong, labelled) if labelled else (None, None)
        return ReuseReport(
            **counted,
            hits_by_kind={row.provenance: row.jobs for row in hits},
            refused_by_rule={row.rule: row.refused for row in rules},
            wrong_rate=wrong / labelled if labelled else None,
            wrong_rate_low=low,
            wrong_rate_high=high,
        )


def wilson(hits: int, trials: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the score interval of a share.

    After E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927).

    Args:
        hits: Trials that came out so, 0 to `trials`.
        trials: 1 or more.
        z: Quantile of the normal distribution; the default is for 95 %.

    Returns:
        Lower and upper bound, between 0 and 1.
    """
    share, square = hits / trials, z * z
    middle = share + square / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    below = 1 + square / trials
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)
