"""Steps that should be captured as CUDA graphs, where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffpipe.config.schema import Config
from diffpipe.errors import ConfigError
from diffpipe.models import make_model
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.pipeline.replay import MOST, TRIED, Kinds, check_captured
from diffpipe.train import train
from tests.pipeline.test_memory import Toys, batch_of, built, config_of
from tests.runs_program import prepared


def test_a_device_without_graphs_ends_a_run_before_anything_is_encoded(tmp_path: Path) -> None:
    config = prepared("flux", "lora", tmp_path, 1)
    asked = config.model_copy(update={"memory": config.memory.model_copy(update={"cuda_graphs": True})})
    with pytest.raises(ConfigError, match=r"memory.cuda_graphs: true, on cpu[\s\S]*fix: set it to false"):
        train(asked, resume=None, make_sinks=list)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_what_has_no_backward_pass_runs_anywhere_by_the_config_of_a_run_with_graphs(toys: Toys) -> None:
    losses = []
    for captures in (False, True):
        config = config_of("flux", toys("flux"), {"rank": 4}, {"cuda_graphs": captures})
        model = make_model(config.model, config.objective)
        with open_mesh(config.mesh) as mesh:
            losses.append(built(config, model, mesh).evaluate(batch_of(model, 0)).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", ["chroma", "lumina2"])
def test_a_family_that_waits_for_the_host_is_named(toys: Toys, family: str) -> None:
    config = config_of(family, toys(family), {"rank": 4}, {"cuda_graphs": True})
    with pytest.raises(ConfigError, match=f"memory.cuda_graphs: true, where each pass of {family} copies between host and device"):
        check_captured(True, make_model(config.model, config.objective), torch.device("cuda"))
    check_captured(False, make_model(config.model, config.objective), torch.device("cpu"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"mesh": {"stages": 2}}, "mesh.stages, replicate and shard must be 1"),
        ({"mesh": {"replicate": 2}}, "mesh.stages, replicate and shard must be 1"),
        ({"optimizer": {"release": True, "clip": None}}, "optimizer.release must be false"),
        ({"adapter": None, "optimizer": {"clip": None}, "memory": {"swap": 2}}, "memory.swap must be 0 without an adapter section"),
        ({"memory": {"swap": 2, "pin": False}}, "memory.pin must be true"),
    ],
    ids=str,
)
def test_what_does_not_go_with_graphs_is_told(more: dict, told: str) -> None:
    raw = {"run": {"steps": 1}, "model": {"family": "flux", "path": "x"}, "adapter": {}, "data": {"folders": [{"path": "x"}]}, **more}
    raw["memory"] = {"cuda_graphs": True, **more.get("memory", {})}
    with pytest.raises(ValueError, match=f"memory.cuda_graphs is true, so {told}"):
        Config.model_validate(raw)


def test_steps_are_captured_that_were_run_and_come_back_to_what_they_found() -> None:
    kinds = Kinds([])
    for before, after in ((None, "a"), ("a", "b"), ("b", "c")):
        kinds.note(("wide", before), before, after, [])
    assert not kinds.may_be_captured(("wide", "b"), "b"), "it is not known where steps go on from c"
    kinds.note(("wide", "c"), "c", "b", [])
    assert [state for state in (None, "a", "b", "c") if kinds.may_be_captured(("wide", state), state)] == ["b", "c"]
    assert not kinds.may_be_captured(("tall", "b"), "b"), "of this bucket nothing has been run"
    kinds.note(("tall", "b"), "b", "c", [])
    assert kinds.may_be_captured(("tall", "b"), "b")


@pytest.mark.parametrize(("states", "told"), [(1, "there are many buckets"), (TRIED + 1, "try another memory.room")])
def test_of_too_many_kinds_of_steps_a_run_is_told(states: int, told: str) -> None:
    captured: list[int] = []
    kinds = Kinds(captured)
    assert kinds.complaint() is None
    for number in range(TRIED + 1):
        kinds.note(number, number % states, (number + 1) % states, [])
        if kinds.may_be_captured(number, number % states):
            captured.append(number)
    assert len(captured) == (MOST if states == 1 else 0)
    assert kinds.complaint() is not None and told in str(kinds.complaint())
