"""The runner of the benchmarks: goes on when one fails, and says so."""

from __future__ import annotations

import ast
import asyncio
import json
import time
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as runner
from tests.benchmarks import chat_rows
from tests.benchmarks.figures import Figure, flattened, packed, unpacked
from tests.benchmarks.registry import BENCHMARKS, Benchmark
from tests.benchmarks.turn_watch import TurnWatch


@pytest.mark.parametrize(
    ("figure", "met"),
    [
        (Figure(name="ratio", value=1.0), None),
        (Figure(name="ratio", value=0.97, at_least=0.97), True),
        (Figure(name="ratio", value=0.96, at_least=0.97), False),
        (Figure(name="p50", value=2.1, unit="ms", at_most=2.0), False),
        (Figure(name="p50", value=float("nan"), at_most=2.0), False),
    ],
)
def test_a_figure_knows_whether_it_meets_its_target(figure: Figure, met: bool | None) -> None:
    """A figure that is no number meets none."""
    assert figure.met is met


def test_figures_pass_from_process_to_process() -> None:
    """Nothing is lost on the way."""
    found = [Figure(name="ratio", value=1.5, at_least=1.25, comparison="peer: 3 rows/s")]
    assert unpacked(packed(found)) == found


def test_nested_results_become_dotted_names() -> None:
    """Numbers only."""
    found = {"a": 1, "b": {"c": 2.5, "d": "text", "e": True}}
    assert dict(flattened(found)) == {"a": 1.0, "b.c": 2.5}


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda one: one.name)
def test_every_benchmark_offers_figures(benchmark: Benchmark) -> None:
    """A registered module has the function that the runner calls."""
    source = Path(runner.__file__).with_name(f"{benchmark.name}.py").read_text()
    functions = {
        node.name: node
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert "figures" in functions
    assert [given.arg for given in functions["figures"].args.kwonlyargs] == ["quick"]


def test_one_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status says it, and so do table and file."""
    names = ("missing", "chat_rows")
    monkeypatch.setattr(
        runner, "BENCHMARKS", [Benchmark(name=name, about="a test") for name in names]
    )
    written = tmp_path / "benchmarks.json"
    assert runner.main(["--quick", "--output", str(written)]) == 1
    found = json.loads(written.read_text())["benchmarks"]
    assert set(found) == set(names)
    assert all(one["error"] and not one["figures"] for one in found.values())
    assert "FAILED: missing, chat_rows" in capsys.readouterr().out


def test_made_files_hold_what_they_promise(tmp_path: Path) -> None:
    """One file of distinct questions, one in which three of ten repeat."""
    cold, repeats = chat_rows.write_files(tmp_path, rows=100)
    asked = [
        [json.loads(line)["body"]["messages"][0]["content"] for line in path.open()]
        for path in (cold, repeats)
    ]
    assert [len(rows) for rows in asked] == [100, 100]
    assert [len(set(rows)) for rows in asked] == [100, 70]
    assert not set(asked[0]) & set(asked[1])


def test_those_that_need_more_run_only_when_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry, or minutes: nobody is surprised by them."""
    ran: list[str] = []
    plain, special = (
        Benchmark(name=name, about="a test", by_name=by_name)
        for name, by_name in (("plain", False), ("special", True))
    )

    def measured(one: Benchmark, *, quick: bool) -> runner.Run:
        del quick
        ran.append(one.name)
        return runner.Run(benchmark=one, seconds=0.0)

    monkeypatch.setattr(runner, "BENCHMARKS", [plain, special])
    monkeypatch.setattr(runner, "measured", measured)
    output = ["--output", str(tmp_path / "benchmarks.json")]
    assert runner.main(output) == 0
    assert runner.main(["--only", "special", *output]) == 0
    assert ran == ["plain", "special"]


def test_made_up_prompts_are_different_and_the_same_each_time() -> None:
    """Figures of two runs can be compared."""
    from tests.benchmarks.shelf import asked_otherwise, prompts
    from tests.benchmarks.similarity import pairs

    assert prompts(500) == prompts(500)
    assert len(set(prompts(500))) == 500
    assert not set(prompts(500)) & set(asked_otherwise(500))
    assert len(set(pairs(60))) == 60
    assert all(one != other for one, other in pairs(60))


async def test_a_turn_that_waits_is_its_own_and_one_that_works_is_work() -> None:
    watch = TurnWatch()
    with watch.watching():
        await asyncio.sleep(0)
        time.sleep(0.05)  # noqa: ASYNC251  that is what is looked for
        await asyncio.sleep(0)
        until = time.thread_time() + 0.03
        while time.thread_time() < until:
            pass
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    summary = watch.summary()
    assert 50 <= summary["longest_own_ms"] <= summary["longest_wall_ms"]
    assert 30 <= summary["longest_cpu_ms"] < 50
