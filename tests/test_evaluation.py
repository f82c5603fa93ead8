"""An evaluation does not keep a run that is to stop; the run that goes on makes it."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffpipe.checkpoint import best_checkpoint, list_checkpoints
from diffpipe.evaluation import Evaluation
from tests.conftest import ROOT, Command, World
from tests.survival import run_in, same_weights
from tests.test_train import arguments

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
SET = "folders: [{path: toy:pictures-heldout}]"
KEPT = {
    "mesh.stages": 1,
    "run.steps": 3,
    "optimizer.lr": 0.01,
    "schedule.kind": "constant",
    "eval.every_steps": 2,
    "eval.sets": f"[{{name: one, {SET}}}, {{name: two, {SET}}}]",
    "checkpoint.every_steps": "null",
    "checkpoint.keep_best": "true",
}
NUMBER = r"\d+(?:\.\d+)?"
DUE = {
    "adapter.dropout": 0.1,
    "export.every_steps": 2,
    "export.formats": "[diffusers]",
    "preview.prompts": "[a square]",
    "preview.every_steps": 2,
    "preview.at_start": "true",
    "preview.steps": 1,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs lie that share a cache."""
    return tmp_path_factory.mktemp("home")


def logged(run: Path) -> str:
    return (run / "log.txt").read_text(encoding="utf-8")


def made(run: Path) -> list[str]:
    """The held-out losses, exports and previews that a run tells of, in order."""
    return re.findall(r"^(?:step \d+ eval/|export |preview \S*/).*", logged(run).replace(str(run), ""), re.M)


def test_what_is_due_behind_the_step_of_a_stop_is_made_up_for(command: Command, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(*arguments(home / "whole", **KEPT, **DUE))
    stopped = home / "stopped"
    evaluate, by, at = Evaluation._evaluate, "", 0

    def interrupted(self: Evaluation, step: int, name: str, *given: Any) -> Any:
        if step == at and name == "two":  # of the first there are numbers then
            if by == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)  # a thread takes it
            elif by == "file":
                (run_in(stopped) / "stop").touch()
                time.sleep(1.1)  # the folder is looked into once a second
        return evaluate(self, step, name, *given)

    monkeypatch.setattr(Evaluation, "_evaluate", interrupted)
    resume: list[str] = []
    for by, at, code in (("signal", 0, 75), ("signal", 0, 75), ("file", 2, 0), ("signal", 3, 75), ("", 3, 0)):
        done = command(*arguments(stopped, **KEPT, **DUE), *resume, check=False)
        run = run_in(stopped)
        assert done.exit_code == code, done.output
        assert (f"the evaluation of step {at} was given up, for the run is to end" in done.stdout) == bool(by)
        assert list_checkpoints(run / "checkpoints")[-1].name == f"step-{at:08d}"
        (run / "stop").touch()  # when nothing runs
        resume = ["--resume", str(run)]
    whole = run_in(home / "whole")
    assert made(run) == made(whole)
    assert logged(run).count("is from before this start; it is removed and not obeyed") == 4
    best, expected = (best_checkpoint(each / "checkpoints") for each in (run, whole))
    assert best is not None and expected is not None and best[1] == expected[1]
    assert same_weights(whole, run)


def test_all_ranks_give_up_an_evaluation_at_one_batch_when_one_of_them_is_to_stop(command: Command, world: World, home: Path) -> None:
    alone = {
        **KEPT,
        "batch.micro": 4,
        "batch.accumulate": 4,
        "eval.quantiles": "[0.1, 0.3, 0.5, 0.7, 0.9]",
        "export.formats": "[diffusers]",
    }
    command(*arguments(home / "alone", **alone))
    shared = {**alone, "batch.accumulate": 2, "mesh.stages": 2, "mesh.replicate": 2}
    # Rank 1, the first stage of the second replica, which has one batch of each set to the other's two: in the first set, behind step 2.
    done = world(4, str(ROOT / "tests/evaluation_program.py"), "1", "13", *arguments(home / "four", **shared), check=False)
    whole, run = run_in(home / "alone"), run_in(home / "four")
    assert "the evaluation of step 2 was given up, for the run is to end\n" in done.stdout
    assert f"stopped behind step 2; --resume {run} goes on" in logged(run)
    assert [line.split()[1] for line in made(run)] == ["0", "0"], "there are no numbers of what was given up"
    command(*arguments(run.parent, **alone), "--resume", run)
    got, expected = ([float(x) for x in re.findall(NUMBER, "".join(made(each)))] for each in (run, whole))
    assert got == pytest.approx(expected, rel=1e-3)
