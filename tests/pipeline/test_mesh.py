"""Any mesh gives the whole model's loss and gradients, for every family, trained whole or through adapters, at changing shapes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from diffpipe.models import MODELS, model_class
from tests.conftest import ROOT

# What a mesh adds to two stages is the same for all families: one with captions of any length, one with trained text
# encoders, one of clips.
SOME = ["lumina2", "sdxl", "wan"]


@pytest.mark.parametrize(
    ("stages", "replicas", "families"), [(2, 1, sorted(MODELS)), (1, 2, SOME), (3, 1, SOME), (2, 2, SOME)], ids=["2x1", "1x2", "3x1", "2x2"]
)
def test_a_mesh_gives_the_whole_models_loss_and_gradients(
    world: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
    stages: int,
    replicas: int,
    families: list[str],
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mesh"
    done = world(stages * replicas, ROOT / "tests/pipeline/mesh_program.py", stages, replicas, folder, *families)
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [
        f"same: {family} {kind}" for family in families for kind in kinds_of(family)
    ]


def kinds_of(family: str) -> tuple[str, ...]:
    """The ways that a family is trained."""
    encoders = "model.train_text_encoders" in model_class(family).options
    return ("full", "lora", "full with text encoders") if encoders else ("full", "lora")
