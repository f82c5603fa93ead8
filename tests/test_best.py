"""The checkpoint with the lowest held-out loss outlives newer ones, and is found again by a resumed run and by an export."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffpipe.checkpoint import best_checkpoint, list_checkpoints, read_weights
from tests.conftest import Command
from tests.survival import run_in
from tests.test_train import arguments

# A rate that makes the held-out loss rise and fall.
KEPT = {
    "mesh.stages": 1,
    "run.steps": 3,
    "optimizer.lr": 0.01,
    "schedule.kind": "constant",
    "eval.every_steps": 1,
    "checkpoint.every_steps": "null",
    "checkpoint.keep": 1,
    "checkpoint.keep_best": "true",
    "export.formats": "[comfyui]",
}


@pytest.fixture(scope="module")
def trained(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose last step is not its best."""
    output = tmp_path_factory.mktemp("best") / "runs"
    command(*arguments(output, **KEPT))
    return run_in(output)


@pytest.fixture
def run(trained: Path) -> Path:
    """A copy of it, beside the same cache."""
    copied = trained.parent.with_name("copied") / trained.name
    shutil.rmtree(copied.parent, ignore_errors=True)
    shutil.copytree(trained, copied)
    return copied


def losses(run: Path) -> dict[int, float]:
    """The held-out loss behind every step but the one before the first."""
    told = re.findall(r"^step (\d+) eval/held-out/loss (\S+)", (run / "log.txt").read_text(), re.M)
    return {int(step): float(loss) for step, loss in told if step != "0"}


def kept(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run / "checkpoints")]


def test_the_best_is_kept_beside_the_newest_and_told_of(trained: Path) -> None:
    found = losses(trained)
    best = min(found, key=lambda step: found[step])
    assert best < 3 and kept(trained) == [best, 3]
    told = best_checkpoint(trained / "checkpoints")
    assert told is not None and told[1].step == best and told[1].loss == pytest.approx(found[best], abs=1e-5)
    assert f"step {best} is the best so far: held-out loss {found[best]:.5f}" in (trained / "log.txt").read_text()
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert events.Scalars("eval/best_loss")[-1].value == pytest.approx(found[best], abs=1e-5)


def test_a_resumed_run_knows_it_and_gives_it_up_only_for_a_better_one(command: Command, run: Path) -> None:
    best = kept(run)[0]
    done = command(*arguments(run.parent, **{**KEPT, "run.steps": 4}), "--resume", run)
    found = losses(run)
    assert f"step {best} is the best so far" in done.stdout
    assert kept(run) == sorted({min(found, key=lambda step: found[step]), 4})


def test_losses_of_other_times_are_not_compared(command: Command, run: Path) -> None:
    done = command(*arguments(run.parent, **{**KEPT, "run.steps": 4, "eval.quantiles": "[0.9]"}), "--resume", run)
    assert "step 4 is the best so far" in done.stdout, "the first that is measured so"
    assert kept(run) == [4]


def test_the_best_is_exported(command: Command, run: Path) -> None:
    told = best_checkpoint(run / "checkpoints")
    assert told is not None
    path, best = told
    command("export", run, "--checkpoint", "best")
    weights = read_weights(path)
    exported = load_file(run / f"exports/step-{best.step:08d}/transformer/diffusion_pytorch_model.safetensors")
    assert exported.keys() == weights.keys() and all(torch.equal(exported[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("checkpoint", "told"), [("newest", "expected: the step of a checkpoint"), ("2000", "no checkpoint of step 2000")])
def test_another_name_is_a_clear_error(command: Command, run: Path, checkpoint: str, told: str) -> None:
    done = command("export", run, "--checkpoint", checkpoint, check=False)
    assert done.exit_code == 1 and told in done.stderr


def test_whole_weights_have_no_names_of_kohya(command: Command, run: Path) -> None:
    done = command("export", run, "--to", "kohya", check=False)
    assert done.exit_code == 1 and "--to: kohya names are for adapters" in done.stderr


def test_a_run_without_evaluations_has_no_best(command: Command, tmp_path: Path) -> None:
    done = command(*arguments(tmp_path / "run", **{**KEPT, "eval.sets": "[]"}), check=False)
    assert done.exit_code == 1 and "there are no eval.sets that tell which is best" in done.stderr
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("run: {steps: 1}\nmodel: {family: flux}\ndata: {folders: [{path: a}]}\n")
    done = command("export", tmp_path / "run", "--checkpoint", "best", check=False)
    assert done.exit_code == 1 and "no checkpoint has a held-out loss" in done.stderr
