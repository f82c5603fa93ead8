"""Every schedule trains the whole model: losses, gradients and weights of three steps are those of one process."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT, World

CASES = [
    "flux/interleaved/streamed/1",
    "wan/interleaved/full/1",
    "sdxl/interleaved/lora/1",
    "wan/zero-bubble/full/1",
]


@pytest.mark.parametrize(("processes", "cases"), [(2, CASES), (4, ["wan/interleaved/full/2"])], ids=["stages", "shards"])
def test_a_schedule_trains_the_whole_model(
    world: World, tmp_path_factory: pytest.TempPathFactory, processes: int, cases: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "schedules"
    done = world(processes, ROOT / "tests/pipeline/schedule_program.py", processes, folder, *cases)
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in cases]
