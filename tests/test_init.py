"""`diffpipe init` asks, or is told by options, and writes a config that the planner has found to fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffpipe.cli import app
from diffpipe.config.load import load_config, validate
from diffpipe.config.reference import commented_yaml
from diffpipe.errors import ConfigError
from diffpipe.models import MODELS, make_model, model_class
from diffpipe.optim import check_optimizer
from diffpipe.starter import Answers, candidates, keys_of, launcher, start, usual_frames, usual_resolution
from tests.conftest import ROOT, Command
from tests.drawn import draw_image

ALL = "--data", "media", "--card", "24", "--gpus", "1", "--train", "lora", "--resolution", "64", "--frames", "1,9"


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_every_family_gets_keys_that_it_has_a_use_for(family: str, full: bool) -> None:
    kind = model_class(family)
    controls = "before" if kind.takes_controls else None
    answers = Answers(family, None, "media", controls, 24, full, usual_resolution(kind), usual_frames(kind))
    config = validate(keys_of(answers, {}), "the answers")
    make_model(config.model, config.objective)
    check_optimizer(config.optimizer, apart=full)
    check_optimizer(validate(keys_of(answers, {"shard": 2}), "the answers").optimizer, sharded=full)
    assert (config.adapter is None) == full and config.data.frames == ([1, 33] if kind.geometry.fps else [1])


@pytest.mark.parametrize(("family", "what", "gpus"), [("wan", "lora", 1), ("lumina2", "full", 2)])
def test_what_it_writes_passes_plan(command: Command, tmp_path: Path, monkeypatch, family: str, what: str, gpus: int) -> None:
    monkeypatch.chdir(tmp_path)  # where runs, and so the toy, go
    draw_image(tmp_path / "media" / "a.png", (64, 64), "a picture", seed=1)
    told = command("init", "my.yaml", "--family", family, "--model", f"toy:{family}", *ALL, "--train", what, "--gpus", str(gpus)).stdout
    config = load_config(tmp_path / "my.yaml")
    assert (config.model.family, config.adapter is None) == (family, what == "full")
    assert config.data.folders[0].path == "media" and config.data.resolutions == [64]
    assert "1x64x64" in command("plan", "my.yaml").stdout and f"{launcher(gpus)} train my.yaml" in told
    assert (config.mesh.replicas, config.mesh.shard) == (gpus, gpus if what == "full" else 1)
    assert [line for line in (tmp_path / "my.yaml").read_text().splitlines() if line.strip().startswith("# Learning rate after")]


def test_on_several_cards_weights_stay_there_where_some_mesh_allows_it() -> None:
    tried = list(candidates(Answers("flux", None, "data", None, 24, full=False, resolution=512, gpus=4)))
    meshes = [raw.get("mesh") for raw in tried]
    assert meshes[:3] == [{"replicate": 4}, {"stages": 2, "replicate": 2}, {"stages": 4}] and meshes[3:] == [{"stages": 4}] * 6
    assert [raw["memory"].get("swap") for raw in tried] == [0, 0, 0, *[None] * 6], "weights stream only where none does"
    assert [raw["batch"]["accumulate"] for raw in tried[:3]] == [1, 4, 8]
    first, *_ = candidates(Answers("flux", None, "data", None, 80, full=True, resolution=512, gpus=4))
    assert first["mesh"] == {"shard": 4}


def test_questions_are_asked_in_turn_and_again_after_an_answer_that_does_not_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_image(tmp_path / "pictures of mine" / "a.png", (64, 64), "a picture", seed=1)
    answers = ["fluxx", "flux", "toy:flux", "pictures of mine", "much", "16", "1", "both", "full", "0", "64"]
    done = CliRunner().invoke(app, ["init", "my own.yaml"], input="\n".join(answers) + "\n")
    assert done.exit_code == 0, done.output
    assert "there is no family 'fluxx'" in done.output and "expected: lora or full" in done.output
    assert '`diffpipe inspect "my own.yaml"`' in done.output and all(len(line) < 80 for line in done.output.splitlines()[:2])
    config = load_config(tmp_path / "my own.yaml")
    assert config.data.folders[0].path == "pictures of mine" and config.adapter is None and config.memory.budget == 14 << 30


def test_without_a_person_it_says_which_option_would_answer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffpipe", "init", str(tmp_path / "my.yaml"), "--family", "flux"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "--model" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--family", "fluxx"), "there is no family 'fluxx'"),
        (("--card", "0"), "--card"),
        (("--card", "0.5"), "--card"),
        (("--train", "some"), "lora or full"),
        (("--family", "wan", "--frames", "1,x"), "--frames: 'x'"),
        (("--model", "nothing/here"), "--model: nothing/here: no such file"),
    ],
)
def test_a_wrong_answer_is_a_clear_error(command: Command, tmp_path: Path, options: tuple[str, ...], told: str) -> None:
    done = command("init", tmp_path / "my.yaml", "--yes", *options, check=False)
    assert done.exit_code == 1 and told in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_file_that_is_there_is_kept(command: Command, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("mine")
    done = command("init", tmp_path / "my.yaml", "--yes", check=False)
    assert done.exit_code == 1 and "is there already" in done.stderr and (tmp_path / "my.yaml").read_text() == "mine"


def test_a_commented_config_has_each_keys_meaning_above_it() -> None:
    text = commented_yaml({"run": {"steps": 5}, "data": {"folders": [{"path": "a", "repeats": 2.0}], "aspect": [1.0]}}, ["A head."])
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "# A head." and "- path: a" in lines and "repeats: 2.0" in lines and "aspect: [1.0]" in lines
    assert lines[lines.index("steps: 5") - 1].startswith("# Optimizer steps to train")
    with pytest.raises(KeyError):
        commented_yaml({"run": {"stesp": 5}}, [])


def test_a_family_with_controls_needs_their_folder() -> None:
    with pytest.raises(ConfigError, match="--controls"):
        start(Answers("flux-kontext", None, "data", None, 24, full=False, resolution=512))
