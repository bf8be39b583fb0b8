"""What a namespace says of reuse, what a request says, and the file that says it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schema.errors import ConfigurationError, InvalidRequestError
from schema.jobs import Reuse, Verify
from workers.engine import HandlerConfig, RequestScope
from workers.runtime import engine_config
from workers.settings import Settings, load_settings
from workers.submission import build_spec

WRITTEN = {
    "cache": {"ttl_s": 3600},
    "similarity": {"threshold": 0.9},
    "plugins": {"slow": {"budget_s": 1, "retry": {"attempts": 1}}},
    "namespaces": {
        "faq": {"reuse": "semantic", "ttl_s": 60, "sliding_ttl": True, "verify": "engine"},
        "trial": {"reuse": "semantic", "shadow": True, "threshold": 0.8},
    },
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(WRITTEN))
    return path


def test_what_a_namespace_leaves_out_is_as_for_all(written: Path) -> None:
    config = HandlerConfig.from_file(written)
    faq, trial, other = (config.policy(name) for name in ("faq", "trial", "other"))
    assert (faq.reuse, faq.threshold, faq.ttl_s) == (Reuse.SEMANTIC, 0.9, 60)
    assert (faq.sliding_ttl, faq.shadow, faq.verify) == (True, False, Verify.ENGINE)
    assert (trial.threshold, trial.ttl_s, trial.shadow) == (0.8, 3600, True)
    assert (other.reuse, other.shadow, other.verify) == (Reuse.EXACT, False, Verify.GUARD)


def test_what_a_request_says_counts_first(written: Path) -> None:
    policy = HandlerConfig.from_file(written).policy("faq")
    asked = RequestScope(namespace="faq", reuse=Reuse.OFF, ttl_s=5, sliding_ttl=False, tags=("t",))
    settled = asked.under(policy)
    assert (settled.reuse, settled.ttl_s, settled.sliding_ttl) == (Reuse.OFF, 5, False)
    assert (settled.threshold, settled.verify, settled.tags) == (0.9, Verify.ENGINE, ("t",))
    assert settled.report is asked.report
    assert RequestScope(namespace="faq").under(policy).reuse == Reuse.SEMANTIC


def test_a_worker_reads_the_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_ENGINE_CONFIG", str(written))
    config = engine_config(load_settings(namespace="mine"))
    assert config.policy("faq").reuse == Reuse.SEMANTIC
    # What the worker itself decides is not lost by it.
    assert (config.require_scope, config.namespace) == (True, "mine")
    assert config.enrichment_wait_s == engine_config(Settings()).enrichment_wait_s == 1.0


def test_what_a_job_says_reaches_the_engine() -> None:
    from workers.answering import _scope_of

    said = {
        "reuse": "semantic",
        "threshold": 0.9,
        "ttl_s": 60.0,
        "sliding_ttl": True,
        "shadow": True,
        "verify": "engine",
        "tags": ["t"],
    }
    spec = build_spec("Why?", said)
    job: Any = SimpleNamespace(namespace="faq", id=spec.id)
    scope = _scope_of(job, spec.request, spec.options)
    assert {name: getattr(scope, name) for name in said} == {**said, "tags": ("t",)}
    nothing = build_spec("Why?", {}).options
    assert _scope_of(job, spec.request, nothing).under(HandlerConfig().policy("faq")).reuse == (
        Reuse.EXACT
    )
    with pytest.raises(InvalidRequestError, match=r"guard, engine, not 'engin'.*engine"):
        build_spec("Why?", {"verify": "engin"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "the whole: Invalid JSON"),
        ('{"similarity": {"threshold": 2}}', "similarity.threshold: Input should be less"),
        ('{"namespaces": {"a": {"reuse": "fuzzy"}}}', "namespaces.a.reuse: Input should be"),
        ('{"cash": {}}', "cash: Extra inputs"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        HandlerConfig.from_file(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)
    with pytest.raises(ConfigurationError, match="no such file"):
        load_settings(engine_config=tmp_path / "not_there.json")
