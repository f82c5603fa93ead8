"""A mesh gives the whole model's loss and gradients, trained whole or through adapters, at changing shapes; and streams weights."""

from __future__ import annotations

import pytest

from diffpipe.models import model_class
from tests.conftest import ROOT, Toys, World, home_of

# Every family trains on two stages in test_families.py, and every cut of each is compared in test_cut.py. What a mesh adds is the
# same for all: here are one with captions of any length, one with trained text encoders, one of clips.
FAMILIES = ["lumina2", "sdxl", "wan"]


@pytest.mark.parametrize(("stages", "replicas", "families"), [(3, 1, FAMILIES[:1]), (2, 2, FAMILIES[1:])], ids=["3x1", "2x2"])
def test_a_mesh_gives_the_whole_models_loss_and_gradients(
    world: World, toys: Toys, stages: int, replicas: int, families: list[str]
) -> None:
    program = ROOT / "tests/pipeline/mesh_program.py"
    done = world(stages * replicas, program, stages, replicas, home_of(toys, *families), *families)
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [
        f"same: {family} {kind}" for family in families for kind in kinds_of(family)
    ]


def kinds_of(family: str) -> tuple[str, ...]:
    """The ways that a family is trained here."""
    encoders = "model.train_text_encoders" in model_class(family).options
    return ("full with text encoders" if encoders else "full", "lora", "streamed")
