"""The page on cost against size: a table, and a plot in plain SVG."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.benchmarks.sizes import Sizes

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 70
_IMAGE = "cost-against-size.svg"

_BELOW = "rows of the file, or stored answers (0 drawn at 1,000)"

Line = tuple[str, str, list[tuple[float, float]]]  # words, colour, points


def write_report(folder: Path, found: Sizes) -> None:
    """Write ``performance.md`` and its picture.

    Args:
        folder: Of the documentation.
        found: What was measured.
    """
    (folder / "img").mkdir(exist_ok=True)
    (folder / "img" / _IMAGE).write_text(_plot(found))
    (folder / "performance.md").write_text(_page(found))


def _page(found: Sizes) -> str:
    files = "\n".join(
        f"| {run.rows:,} | {run.rate:,.0f} | {run.processor_us:,.0f} | {run.client_mb:,.0f} | "
        f"{run.worker_mb:,.0f} | {run.worker_grew_mb:,.0f} |"
        for run in found.files
    )
    stores = "\n".join(
        f"| {run.stored:,} | {run.look_up_ms:.2f} | {run.missed_rate:,.0f} "
        f"| {run.found_rate:,.0f} |"
        for run in found.stores
    )
    return f"""# Cost against size

Made by `python -m tests.benchmarks.sizes --docs docs` on {len(os.sched_getaffinity(0))} cores,
with Postgres and Valkey on the same machine and one worker. The engine is a **stand-in** that
answers at once: these are the costs of all that is around vLLM, not of vLLM. `make bench` measures
the same up to 100,000 rows. The rates are those of the machine as it was, which may have been busy
with other things; the processor time is not, or hardly.

![Rows a second](img/{_IMAGE})

A batch file of so many different rows, none seen before, from its first row read to its last line
written, one file after the other by the same worker. Memory is the highest that was resident; the
growth is what the worker holds beyond that when it was ready, its caches of answers included.

| rows | rows a second | processor time a row, all parts, µs | client MB | worker MB | growth, MB |
|---:|---:|---:|---:|---:|---:|
{files}

3,000 rows against a store that holds so many answers already: none of the rows among them
(*missed*), and all of them among them but none in the worker's memory (*found*). The look-up is the
median of an exact one.

| stored answers | look-up, ms | missed, rows a second | found, rows a second |
|---:|---:|---:|---:|
{stores}
"""


def _plot(found: Sizes) -> str:
    files = [(float(run.rows), run.rate) for run in found.files]
    missed = [(float(max(run.stored, 1_000)), run.missed_rate) for run in found.stores]
    hits = [(float(max(run.stored, 1_000)), run.found_rate) for run in found.stores]
    lines: list[Line] = [
        ("rows of the file", "#2166ac", files),
        ("stored answers, rows missed", "#1b7837", missed),
        ("stored answers, rows found", "#b2182b", hits),
    ]
    top = 1.2 * max(y for _, _, points in lines for _, y in points)
    drawn = [_axes(top), *(_line(line, at, top) for at, line in enumerate(lines))]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
    style = 'font-family="sans-serif" font-size="12">'
    title = "<title>Rows a second against rows and against stored answers</title>"
    words = (
        "<desc>Rates of batch files by their length, and of 3,000 rows by the store's size.</desc>"
    )
    ground = f'{title}{words}<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    return "\n".join([head + style, ground, *drawn, "</svg>"]) + "\n"


def _x(value: float) -> float:
    return _MARGIN + (math.log10(value) - 3) / 3 * (_WIDTH - 2 * _MARGIN)


def _y(value: float, top: float) -> float:
    return _HEIGHT - _MARGIN - value / top * (_HEIGHT - 2 * _MARGIN)


def _axes(top: float) -> str:
    bottom, right = _HEIGHT - _MARGIN, _WIDTH - _MARGIN
    parts = [
        f'<path d="M{_MARGIN} {_MARGIN}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 20}" text-anchor="middle">{_BELOW}</text>',
        f'<text x="{_MARGIN}" y="{_MARGIN - 45}" font-weight="bold">rows a second</text>',
    ]
    for power in range(3, 7):
        x = _x(10.0**power)
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{10**power:,}</text>')
    for share in (0.25, 0.5, 0.75, 1.0):
        y = _y(share * top, top)
        parts.append(f'<path d="M{_MARGIN} {y}H{right}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{_MARGIN - 6}" y="{y + 4}" text-anchor="end">{share * top:,.0f}</text>'
        )
    return "\n".join(parts)


def _line(line: Line, at: int, top: float) -> str:
    words, colour, points = line
    places = [(_x(x), _y(y, top)) for x, y in points]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
    left = _MARGIN + at * 190
    return (
        f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'
        f'<text x="{left}" y="{_MARGIN - 22}" fill="{colour}">{words}</text>'
    )
