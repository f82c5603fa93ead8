"""Replicas have the same gradients behind a step, also of weights that not all of them used."""

from __future__ import annotations

import re

from tests.conftest import ROOT, World


def test_a_gradient_that_only_some_replicas_have_is_averaged_and_one_that_none_has_stays_away(world: World) -> None:
    done = world(2, ROOT / "tests/pipeline/averaging_program.py")
    assert sorted(re.findall(r"averaged on rank (\d)", done.stdout)) == ["0", "1"]
