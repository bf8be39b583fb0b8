"""Makes docs/benchmarks.md, docs/scale.md's table and their pictures from docs/benchmarks.json.

``make bench && python tools/figures_doc.py benchmarks.json`` takes over what was measured: files
that are named win over what stands there, benchmark by benchmark. With ``--check`` nothing is
written, and the exit status says whether all is as it would be made.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
#: Jobs a second that one card is taken to finish; of 200 tokens each it would be 2,000 tokens.
JOBS_A_CARD = 10.0
FLEETS = (10, 100, 1000)
_BEGIN, _END = "<!-- reckoned -->\n", "<!-- end -->"
_DAY_S = 86_400

_HEAD = """\
# Benchmarks

What `make bench` found. A figure with a target stands beside what it is measured against; one that
missed is shown as it is. {when}

| Benchmark | Figure | Value | Target | | Beside |
|---|---|---|---|---|---|
"""


def benchmarks_page(found: dict[str, Any]) -> str:
    """Return the page with all figures."""
    machine = found["machine"]
    when = (
        f"Measured on {found['at'][:10]} with {machine['cores']} cores ({machine['processor']}), "
        f"no card, Python {machine['python']} and vLLM {machine['vllm']}"
        + (", by the short runs of `--quick`." if found["quick"] else ".")
    )
    lines = []
    for name, one in found["benchmarks"].items():
        if one["error"]:
            lines.append(f"| {name} | failed | | | | {one['error']} |")
        for at, figure in enumerate(one["figures"]):
            mark = {True: "met", False: "**missed**", None: ""}[figure["met"]]
            title = "" if at else f"{name}: {one['about']}"
            lines.append(
                f"| {title} | `{figure['name']}` | {_number(figure['value'])} {figure['unit']} "
                f"| {_target(figure)} | {mark} | {figure['comparison']} |"
            )
    picture = "\n\n![Figures as shares of their targets](img/benchmarks.svg)\n"
    return _HEAD.format(when=when) + "\n".join(lines) + (picture if _with_target(found) else "\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _target(figure: dict[str, Any]) -> str:
    if figure["at_least"] is not None:
        return f"≥ {figure['at_least']:g}"
    return "" if figure["at_most"] is None else f"≤ {figure['at_most']:g}"


def _with_target(found: dict[str, Any]) -> list[tuple[str, float, bool]]:
    """Return label, share of the target (1 is just met, more is better) and whether it is met."""
    shares = []
    for name, one in found["benchmarks"].items():
        for figure in one["figures"]:
            if figure["met"] is None or figure["value"] <= 0:
                continue
            if figure["at_least"] is not None:
                share = figure["value"] / figure["at_least"] if figure["at_least"] else 1.0
            else:
                share = figure["at_most"] / figure["value"]
            shares.append((f"{name}: {figure['name']}", share, figure["met"]))
    return shares


def targets_picture(found: dict[str, Any]) -> str:
    """Return a picture of every figure as a share of its target, on a logarithmic scale."""
    rows = _with_target(found)
    top, step, left, width = 40, 22, 330, 360
    height = top + step * len(rows) + 30
    low, high = 0.1, 10.0

    def x_of(share: float) -> float:
        inside = min(max(share, low), high)
        return left + width * math.log(inside / low) / math.log(high / low)

    parts = []
    for mark, label in ((0.1, "a tenth"), (1.0, "the target"), (10.0, "ten times better")):
        parts.append(
            f'<line x1="{x_of(mark):.1f}" x2="{x_of(mark):.1f}" y1="{top - 8}" '
            f'y2="{height - 24}" stroke="#bbb"/>'
            f'<text x="{x_of(mark):.1f}" y="{top - 14}" text-anchor="middle">{label}</text>'
        )
    for number, (label, share, met) in enumerate(rows):
        y = top + step * number
        start, end = sorted((x_of(1.0), x_of(share)))
        parts.append(
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{start:.1f}" y="{y}" width="{max(2.0, end - start):.1f}" height="14" '
            f'fill="{"#1b7837" if met else "#b2182b"}"/>'
        )
    about = "Bars to the right of the middle line are better than the target, to the left worse."
    return _svg(left + width + 70, height, "Figures as shares of their targets", about, parts)


def _ceilings(found: dict[str, Any]) -> dict[str, float]:
    figures = found["benchmarks"]["ceilings"]["figures"]
    return {figure["name"]: figure["value"] for figure in figures}


def scale_table(found: dict[str, Any]) -> str:
    """Return what fleets ask of the shared servers, reckoned from the cost of a job."""
    cost = _ceilings(found)
    heading = (
        f"| Cards | Jobs a second, at {JOBS_A_CARD:g} a card | Postgres, all new "
        "| Postgres, all known | Valkey | Producers | Rows of jobs a day |"
    )
    lines = [heading, "|---|---|---|---|---|---|---|"]
    for cards in FLEETS:
        rate = cards * JOBS_A_CARD
        cores = {
            name: rate * cost[name] / 1000
            for name in ("new.postgres_ms", "known.postgres_ms", "new.valkey_ms", "new.producer_ms")
        }
        grown = rate * _DAY_S * cost["known.postgres_bytes"] / 1e9
        lines.append(
            f"| {cards:,} | {rate:,.0f} | {cores['new.postgres_ms']:.2g} cores "
            f"| {cores['known.postgres_ms']:.2g} cores | {cores['new.valkey_ms']:.2g} cores "
            f"| {cores['new.producer_ms']:.2g} cores | {grown:,.0f} GB |"
        )
    rates = (
        f"One job cost Postgres {cost['new.postgres_ms']:.2f} ms of a core when its answer was new "
        f"(row, answer, vector in the index, analysis, outcome: "
        f"{cost['new.postgres_bytes'] / 1000:.1f} kB) and {cost['known.postgres_ms']:.3f} ms when "
        f"it was known ({cost['known.postgres_bytes'] / 1000:.1f} kB); Valkey "
        f"{cost['new.valkey_ms']:.3f} ms; the producer "
        f"{cost['new.producer_ms']:.3f} ms. So one core of Postgres takes "
        f"{1000 / cost['new.postgres_ms']:,.0f} new jobs a second, or "
        f"{1000 / cost['known.postgres_ms']:,.0f} known ones, and one core of Valkey "
        f"{1000 / cost['new.valkey_ms']:,.0f}."
    )
    return rates + "\n\n" + "\n".join(lines) + "\n"


def scale_picture(found: dict[str, Any]) -> str:
    """Return lines of the cores that a fleet asks for, both scales logarithmic."""
    cost = _ceilings(found)
    lines = (
        ("new.postgres_ms", "Postgres, all new", "#b2182b"),
        ("new.producer_ms", "producers", "#999999"),
        ("known.postgres_ms", "Postgres, all known", "#ef8a62"),
        ("new.valkey_ms", "Valkey", "#2166ac"),
    )
    left, top, width, height = 70, 30, 420, 300
    low, high = 0.0001, 100.0

    def x_of(cards: float) -> float:
        return left + width * math.log10(cards) / 3

    def y_of(cores: float) -> float:
        inside = min(max(cores, low), high)
        return top + height * math.log10(high / inside) / math.log10(high / low)

    parts = [
        f'<text x="{x_of(cards):.0f}" y="{top + height + 18}" text-anchor="middle">{cards:,}</text>'
        for cards in (1, 10, 100, 1000)
    ]
    for power in range(-4, 3):
        y = y_of(10.0**power)
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for name, label, colour in lines:
        ends = [(x_of(n), y_of(n * JOBS_A_CARD * cost[name] / 1000)) for n in (1, 1000)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in ends)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
            f'<text x="{ends[1][0] + 6:.1f}" y="{ends[1][1] + 4:.1f}" fill="{colour}">'
            f"{label}</text>"
        )
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">cards</text>'
        f'<text x="{left}" y="{top - 12}">cores</text>'
    )
    about = "Cores of each shared server that a fleet of so many cards keeps busy."
    return _svg(left + width + 150, top + height + 50, "Cores over cards", about, parts)


def _svg(width: int, height: int, title: str, about: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12"><title>{title}</title><desc>{about}</desc>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each file and what it is to hold."""
    found = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))
    yield DOCS / "benchmarks.md", benchmarks_page(found)
    if _with_target(found):
        yield DOCS / "img/benchmarks.svg", targets_picture(found)
    yield DOCS / "img/scale.svg", scale_picture(found)
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    yield DOCS / "scale.md", before + _BEGIN + scale_table(found) + _END + after


def take_over(files: Sequence[Path]) -> None:
    """Put newly measured benchmarks into docs/benchmarks.json.

    Args:
        files: As ``python -m tests.benchmarks --output`` writes them.
    """
    kept = DOCS / "benchmarks.json"
    found = json.loads(kept.read_text(encoding="utf-8"))
    for file in files:
        new = json.loads(file.read_text(encoding="utf-8"))
        quick = found["quick"] or new["quick"]
        found |= {**new, "quick": quick, "benchmarks": found["benchmarks"] | new["benchmarks"]}
    kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Write the files, or compare them.

    Args:
        arguments: ``--check``, or files of new figures.
    """
    take_over([Path(word) for word in arguments if not word.startswith("-")])
    stale = [
        path
        for path, content in list(pages())
        if not path.exists() or path.read_text(encoding="utf-8") != content
    ]
    if "--check" in arguments:
        print("\n".join(f"{path} is not current" for path in stale))
        return 1 if stale else 0
    for path, content in list(pages()):
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
