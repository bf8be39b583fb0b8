"""What every test may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from workers import local

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.LocalStack]:
    """The embedded stack on a data folder of this test run."""
    stack = local.start(tmp_path_factory.mktemp("stack") / "data")
    yield stack
    stack.close(wait_s=30)
