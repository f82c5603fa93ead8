"""A mesh gives the whole model's loss and gradients, trained whole or through adapters, at changing shapes; and streams weights."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT, Toys, World, home_of

# Every family trains on two stages in test_families.py, and every cut of each is compared in test_cut.py. What a mesh adds is the
# same for all: here are one with captions of any length, one with trained text encoders, one of clips.
CASES = {(3, 1): ["lumina2/full", "lumina2/streamed"], (2, 2): ["sdxl/full", "wan/full", "wan/lora", "wan/streamed"]}


@pytest.mark.parametrize("mesh", CASES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_a_mesh_gives_the_whole_models_loss_and_gradients(world: World, toys: Toys, mesh: tuple[int, int]) -> None:
    stages, replicas = mesh
    folder = home_of(toys, *(case.split("/")[0] for case in CASES[mesh]))
    done = world(stages * replicas, ROOT / "tests/pipeline/mesh_program.py", stages, replicas, folder, *CASES[mesh])
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in CASES[mesh]]
