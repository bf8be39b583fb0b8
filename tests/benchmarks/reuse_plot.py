"""The trade-off of reuse by meaning as a picture, in plain SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Row = dict[str, float]

_WIDTH, _HEIGHT, _MARGIN = 640, 400, 60

_LINES = (
    ("duplicate_questions.served", "duplicates served", "#1b7837"),
    ("different_meaning.served", "changed sentences wrongly served", "#b2182b"),
    ("templated_prompts.served", "templates wrongly served", "#ef8a62"),
)


def write_plot(path: Path, *, guarded: Sequence[Row], plain: Sequence[Row], shipped: float) -> None:
    """Draw the shares served over the threshold, with the guard and without.

    Args:
        path: Where the SVG goes.
        guarded: Shares by threshold with the guard.
        plain: The same, by threshold alone.
        shipped: The default threshold, marked.
    """
    thresholds = [row["threshold"] for row in guarded]
    low, high = min(thresholds), max(thresholds)

    def x_of(threshold: float) -> float:
        return _MARGIN + (threshold - low) / (high - low) * (_WIDTH - 2 * _MARGIN)

    def y_of(share: float) -> float:
        return _HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN)

    def line(rows: Sequence[Row], key: str, style: str) -> str:
        points = " ".join(f"{x_of(r['threshold']):.1f},{y_of(r[key]):.1f}" for r in rows)
        return f'<polyline points="{points}" fill="none" {style}/>'

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'role="img" aria-labelledby="title desc" font-family="sans-serif" font-size="12">'
        ),
        '<title id="title">What the threshold and the guard let through</title>',
        f'<desc id="desc">{_words(guarded, plain, shipped)}</desc>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        (
            f'<line x1="{x_of(shipped):.1f}" x2="{x_of(shipped):.1f}" y1="{y_of(0):.1f}" '
            f'y2="{y_of(1):.1f}" stroke="#999" stroke-dasharray="2 3"/>'
        ),
        f'<text x="{x_of(shipped) + 4:.1f}" y="{y_of(1) + 4:.1f}">shipped: {shipped:g}</text>',
        (
            f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 14}" text-anchor="middle">'
            "threshold on cosine similarity</text>"
        ),
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = y_of(share)
        parts += [
            f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>',
            (
                f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}" '
                'stroke="#ddd"/>'
            ),
        ]
    parts += [
        f'<text x="{x_of(threshold):.1f}" y="{_HEIGHT - _MARGIN + 18}" '
        f'text-anchor="middle">{threshold:.2f}</text>'
        for threshold in thresholds[::5]
    ]
    for place, (key, label, colour) in enumerate(_LINES):
        parts.append(line(plain, key, f'stroke="{colour}" stroke-dasharray="5 4"'))
        parts.append(line(guarded, key, f'stroke="{colour}" stroke-width="2.5"'))
        parts.append(
            f'<text x="{_MARGIN + 8}" y="{20 + 15 * place}" fill="{colour}">{label} '
            "(dashed: no guard)</text>"
        )
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n")


def _words(guarded: Sequence[Row], plain: Sequence[Row], shipped: float) -> str:
    """Say what the picture shows, for those who cannot see it."""

    def at(rows: Sequence[Row]) -> str:
        row = min(rows, key=lambda one: abs(one["threshold"] - shipped))
        shares = ", ".join(f"{label} {row[key]:.1%}" for key, label, _ in _LINES)
        return f"{shares} (threshold {row['threshold']:g})"

    return (
        "Shares of prompts that are served a stored answer, over the threshold on cosine "
        f"similarity, with the guard and by the threshold alone. With the guard: {at(guarded)}. "
        f"By the threshold alone: {at(plain)}."
    )
