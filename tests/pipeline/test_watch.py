"""A rank that dies, hangs or freezes ends the others, which name it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, World

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9, and several processes")

TOLD = {
    "dies": "rank 1 (%s) has given no sign of life for",
    "freezes": "rank 1 (%s) has given no sign of life for",
    "hangs": "rank 1 (%s) stands still since",
    "fails": "rank 1 (%s) ended: the disk is full",
}


@pytest.fixture(scope="module")
def ended(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the ranks of every case told, and of their exit codes."""
    folder = tmp_path_factory.mktemp("watch")
    world(1, ROOT / "tests/pipeline/watch_program.py", folder, *TOLD, "ends", timeout=120)
    return folder


@pytest.mark.parametrize("how", TOLD)
def test_a_rank_that_comes_to_harm_ends_the_other_which_names_it(ended: Path, how: str) -> None:
    out = (ended / f"{how}-0").read_text()
    before, after = TOLD[how].split("%s")
    assert (ended / f"{how}-0-code").read_text() == "1", out
    assert before in out and after in out, out
    assert "Traceback" not in out


def test_a_rank_that_is_slow_where_it_may_be_ends_nothing(ended: Path) -> None:
    assert [(ended / f"ends-{rank}-code").read_text() for rank in range(2)] == ["0", "0"]
