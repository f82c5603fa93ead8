"""Any mesh gives the whole model's loss and gradients, for every family, trained whole or through adapters, at changing shapes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from diffpipe.models import MODELS, model_class
from tests.conftest import ROOT


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2), (3, 1), (2, 2)])
def test_a_mesh_gives_the_whole_models_loss_and_gradients(
    world: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory, stages: int, replicas: int
) -> None:
    done = world(stages * replicas, ROOT / "tests/pipeline/mesh_program.py", stages, replicas, tmp_path_factory.getbasetemp() / "mesh")
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [
        f"same: {family} {kind}" for family in sorted(MODELS) for kind in kinds_of(family)
    ]


def kinds_of(family: str) -> tuple[str, ...]:
    """The ways that a family is trained."""
    encoders = "model.train_text_encoders" in model_class(family).options
    return ("full", "lora", "full with text encoders") if encoders else ("full", "lora")
