"""The configs that come for each family are those that `diffpipe init` writes, and fit the cards that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.starters import HOME, chosen, fits, starters
from diffpipe.starter import Answers

STARTERS = list(starters())
FAMILIES = sorted({answers.family for _, answers in STARTERS})
# Whose adapters take long to outline; all configs are planned by python -m benchmarks.starters --plan.
SLOW = {"chroma", "flux", "flux-kontext", "hunyuan-video", "sdxl"}


@pytest.mark.parametrize(("file", "answers"), STARTERS, ids=lambda x: f"{x.parent.name}/{x.stem}" if isinstance(x, Path) else "")
def test_a_config_is_one_that_init_writes(file: Path, answers: Answers) -> None:
    assert file.read_text(encoding="utf-8") == chosen(file, answers), "python -m benchmarks.starters"


def test_no_other_config_lies_with_them() -> None:
    assert {file for file, _ in STARTERS} == set(HOME.glob("*/*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_every_family_fits(family: str) -> None:
    kind = "full_4x80gb" if family in SLOW else "lora_12gb"
    assert fits(yaml.safe_load((HOME / family / f"{kind}.yaml").read_text(encoding="utf-8")))
