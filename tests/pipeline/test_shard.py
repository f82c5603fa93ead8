"""Ranks that share weights train as one process does, gather a unit as often as the config says, and end, go on and export alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffpipe.checkpoint import list_checkpoints
from diffpipe.config.load import validate
from diffpipe.config.schema import OptimizerConfig
from diffpipe.errors import ConfigError
from diffpipe.models import make_model
from diffpipe.optim import check_optimizer, halves_move_alike
from diffpipe.optim.named import BY_ELEMENT, EIGHT_BIT
from diffpipe.pipeline.rehearsal import Rehearsal
from tests.conftest import ROOT, Command, Toys, World, home_of
from tests.pipeline.test_memory import config_of
from tests.pipeline.test_rehearsal import CARD, bucket_of
from tests.survival import last_weights, run_in
from tests.test_train import PROGRAM, arguments, losses

CASES = {
    (1, 1, 2): ["flux-lora-false", "sdxl-full-true"],
    (2, 1, 2): ["flux-full-false", "wan-lora-true"],
    (1, 2, 2): ["wan-full-true"],
}


@pytest.mark.parametrize("mesh", CASES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_a_sharded_mesh_has_one_processs_gradients_and_weights_and_gathers_as_often_as_it_should(
    world: World, toys: Toys, mesh: tuple[int, int, int]
) -> None:
    stages, replicate, shard = mesh
    folder = home_of(toys, *(case.split("-")[0] for case in CASES[mesh]))
    done = world(stages * replicate * shard, ROOT / "tests/pipeline/shard_program.py", *mesh, folder, *CASES[mesh])
    assert [line for line in done.stdout.splitlines() if line.startswith("same")] == [f"same: {case}" for case in CASES[mesh]]


def test_a_sharded_full_fine_tune_ends_goes_on_and_exports_as_one_process_does(world: World, command: Command, tmp_path: Path) -> None:
    more = {"mesh.stages": 1, "adapter": "null", "run.steps": 2, "checkpoint.every_steps": 1, "checkpoint.keep": 9, "eval.sets": "[]"}
    more |= {"export.formats": "[diffusers]", "model.dtype": "float32"}
    sharded = {**more, "mesh.shard": 2, "batch.accumulate": 2}
    alone = command(*arguments(tmp_path / "one", **{**more, "batch.accumulate": 4}))
    shared = world(2, *PROGRAM, *arguments(tmp_path / "two", **sharded))
    assert losses(shared.stdout) == pytest.approx(losses(alone.stdout), rel=1e-4)
    expected, got = last_weights(run_in(tmp_path / "one")), last_weights(run_in(tmp_path / "two"))
    assert got.keys() == expected.keys()
    for name, weight in got.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    exported = load_file(next((tmp_path / "two").glob("*/exports/step-00000002/transformer/*.safetensors")))
    assert exported.keys() == got.keys() and all(torch.equal(t, got[name]) for name, t in exported.items())

    # As a kill behind step 1 leaves it.
    run = next((tmp_path / "two").glob("*/config.yaml")).parent
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    shutil.copytree(tmp_path / "two", tmp_path / "other")
    world(2, *PROGRAM, *arguments(tmp_path / "two", **sharded), "--resume")
    assert all(torch.equal(t, got[name]) for name, t in last_weights(run_in(tmp_path / "two")).items()), "on the same mesh bit for bit"
    command(*arguments(tmp_path / "other", **{**more, "batch.accumulate": 4}), "--resume", "")
    for name, weight in last_weights(run_in(tmp_path / "other")).items():
        torch.testing.assert_close(weight, got[name], rtol=1e-4, atol=1e-5)


def test_a_stage_is_foreseen_to_hold_its_shards_and_what_is_gathered_at_once(toys: Toys) -> None:
    def foreseen(**mesh: object):
        config = config_of("wan", toys("wan"), None, {}, mesh=mesh, batch={"accumulate": 4})
        model = make_model(config.model, config.objective)
        return Rehearsal(config, model, 0, CARD).estimate(bucket_of(model), config.memory)

    whole, shared, gathered = foreseen(), foreseen(shard=2), foreseen(shard=2, reshard=False)
    assert shared.trained == gathered.trained == pytest.approx(whole.trained / 2, rel=0.01)
    assert shared.optimizer == pytest.approx(whole.optimizer / 2, rel=0.01)
    assert whole.gathered == 0 and gathered.gathered > whole.trained > shared.gathered
    assert shared.moment.gradients < gathered.moment.gradients == whole.moment.gradients


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"memory": {"swap": "all"}}, "memory.swap must be 0"),
        ({"memory": {"order": "layer"}}, "memory.order must be microbatch or null"),
        ({"memory": {"on_oom": "adapt"}}, "memory.on_oom must be stop"),
        ({"optimizer": {"release": True, "clip": None}}, "optimizer.release must be False"),
        ({"optimizer": {"offload": True}}, "optimizer.offload must be False"),
    ],
)
def test_what_sharding_cannot_go_with_is_refused_with_the_value_that_it_can(section: dict, told: str) -> None:
    raw = {"run": {"steps": 1}, "model": {"family": "wan"}, "data": {"folders": [{"path": "x"}]}, "adapter": {}, **section}
    validate(raw, "cfg.yaml")
    with pytest.raises(ConfigError, match=r"mesh\.shard is 2") as fault:
        validate({**raw, "mesh": {"shard": 2}}, "cfg.yaml")
    assert told in str(fault.value)


@pytest.mark.parametrize("kind", sorted(BY_ELEMENT.difference(EIGHT_BIT)))
def test_an_optimizer_for_sharded_weights_steps_parts_of_a_weight_as_all_of_it(kind: str) -> None:
    assert all(halves_move_alike(OptimizerConfig(kind=kind, lr=lr)) for lr in (1e-4, 1.0))
    check_optimizer(OptimizerConfig(kind=kind), sharded=True)


@pytest.mark.parametrize(("kind", "options"), [("muon", {}), ("prodigy", {}), ("adan", {"max_grad_norm": 0.1})])
def test_an_optimizer_that_needs_all_of_a_weight_is_refused_where_ranks_have_parts(kind: str, options: dict) -> None:
    check_optimizer(OptimizerConfig(kind=kind, options=options))
    with pytest.raises(ConfigError, match="ranks have a part each"):
        check_optimizer(OptimizerConfig(kind=kind, options=options), sharded=True)
