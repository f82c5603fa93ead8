"""A rank that dies, hangs or freezes ends the others, which name it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, free_port

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9, and several processes")

TOLD = {
    "dies": "rank 1 (%s) has given no sign of life for",
    "freezes": "rank 1 (%s) has given no sign of life for",
    "hangs": "rank 1 (%s) stands still since",
    "fails": "rank 1 (%s) ended: the disk is full",
}


def started(how: str) -> list[subprocess.Popen[str]]:
    """Two ranks with no launcher that would end those that are left."""
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(ROOT / "tests/pipeline/watch_program.py"), how]
    return [
        subprocess.Popen(program, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]


@pytest.mark.parametrize("how", TOLD)
def test_a_rank_that_comes_to_harm_ends_the_other_which_names_it(how: str) -> None:
    ranks = started(how)
    try:
        for rank in ranks[:1]:
            out, _ = rank.communicate(timeout=60)
            before, after = TOLD[how].split("%s")
            assert rank.returncode == 1, out
            assert before in out and after in out, out
            assert "Traceback" not in out
    finally:
        for rank in ranks:
            rank.kill()


def test_a_rank_that_is_slow_where_it_may_be_ends_nothing() -> None:
    assert [rank.wait(timeout=60) for rank in started("ends")] == [0, 0]
