"""The documentation builds without a warning, and what is made from figures is current."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import figures_doc

ROOT = Path(__file__).parents[2]


def test_the_site_builds_without_a_warning(tmp_path: Path):
    """A page outside of the navigation, a broken link or anchor would each be one."""
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation, f"name {page.name} in mkdocs.yml"
    # Read offline, a page asks nobody for anything.
    assert 'src="http' not in (site / "index.html").read_text()
    assert 'rel="stylesheet" href="http' not in (site / "index.html").read_text()


@pytest.mark.parametrize("path", [path for path, _ in figures_doc.pages()], ids=lambda p: p.name)
def test_pages_and_pictures_of_figures_are_current(path: Path):
    made = dict(figures_doc.pages())[path]
    assert path.read_text() == made, "run: python tools/figures_doc.py"


def test_a_warning_is_an_error(tmp_path: Path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Start\n\n[away](nowhere.md)\n")
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("promptmill doc", ["doctor"]),
        ("promptmill jobs c", ["cancel"]),
        ("promptmill up --engine", ["--engine-arg"]),
    ],
)
def test_the_shell_completes_words(words: str, offered: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli"],
        env={
            **os.environ,
            "_PROMPTMILL_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == offered, done
