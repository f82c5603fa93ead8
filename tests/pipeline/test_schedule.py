"""Every schedule trains the whole model: losses, gradients and weights of three steps are those of one process."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT, Toys, World, home_of

CASES = [
    "flux/interleaved/streamed/1",
    "flux/eager-1f1b/lora/1",
    "wan/interleaved/full/1",
    "sdxl/interleaved/lora/1",
    "wan/zero-bubble/full/1",
]


@pytest.mark.parametrize(("processes", "cases"), [(2, CASES), (4, ["wan/interleaved/full/2"])], ids=["stages", "shards"])
def test_a_schedule_trains_the_whole_model(world: World, toys: Toys, processes: int, cases: list[str]) -> None:
    folder = home_of(toys, *(case.split("/")[0] for case in cases))
    done = world(processes, ROOT / "tests/pipeline/schedule_program.py", processes, folder, *cases)
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in cases]


def test_stages_hold_what_was_foreseen_however_many_microbatches_cross(world: World, toys: Toys) -> None:
    cases = [f"{schedule}/{family}" for schedule in ("1f1b", "interleaved") for family in ("wan", "flux")] + ["eager-1f1b/flux"]
    done = world(2, ROOT / "tests/pipeline/held_program.py", 2, home_of(toys, *(case.split("/")[1] for case in cases)), *cases)
    parts = {line.split()[1]: [float(part) for part in line.split()[2:]] for line in done.stdout.splitlines() if line.startswith("held")}
    # Payloads on their way, which are not foreseen, weigh more beside these tiny models than beside those of true size.
    assert list(parts) == cases and all(0.9 < part < 1.3 for each in parts.values() for part in each), parts
