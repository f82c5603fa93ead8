"""Full fine-tuning with streamed weights: stepped in the backward pass, block by block, to the same weights bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from diffpipe.checkpoint import list_checkpoints, read_weights
from diffpipe.config.schema import Config, MemoryConfig, OptimizerConfig
from diffpipe.errors import ConfigError, DiffpipeError
from diffpipe.models import MODELS, make_model
from diffpipe.optim import check_optimizer, make_optimizer, set_rates
from diffpipe.optim.state import restore_state, state_of
from diffpipe.pipeline.build import build
from diffpipe.pipeline.mesh import open_mesh
from diffpipe.train import train
from tests.families import frames_of, microbatch
from tests.pipeline.test_memory import config_of
from tests.runs_program import prepared

Toys = Callable[[str], Path]
Outcome = tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]


def trained(
    family: str,
    checkpoint: Path,
    memory: dict[str, Any],
    steps: range,
    count: int = 1,
    before: Outcome | None = None,
    adapter: dict[str, Any] | None = None,
    **optimizer: Any,
) -> Outcome:
    """Losses, squared gradient norms, weights and optimizer state of some steps, perhaps on from where others ended."""
    given = {"clip": None, **optimizer}
    config = config_of(family, checkpoint, adapter, memory, optimizer=given, batch={"accumulate": count})
    if optimizer.get("kind") == "adamw8bit-kahan" or optimizer.get("rounding"):
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16", "trainable_dtype": "bfloat16"})})
    model = make_model(config.model, config.objective)
    losses, squares = [], []
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        part = pipeline.module
        stepper = make_optimizer(config.optimizer, part.named_parameters())
        release = pipeline.memory.release_with(stepper, mesh.mean_over_replicas)
        if before is not None:
            with torch.no_grad():
                for name, p in part.named_parameters():
                    p.copy_(before[2][name])
            restore_state(stepper, before[3], release.waits_on_host())
        set_rates(stepper, 1.0)
        for i in steps:
            batch = [microbatch(model, seed=10 * i + j, count=1, frames=frames_of(model)) for j in range(count)]
            losses.append(pipeline.train(batch).item())
            rest = [p.grad.float().square().sum() for p in part.parameters() if p.grad is not None]
            squares.append((sum(rest, torch.zeros((), device=mesh.device)) + release.square()).item())
            release.step_rest()
            losses.append(pipeline.evaluate(batch[:1]).item())
        pipeline.memory.settle()
        weights = {n: p.detach().clone() for n, p in part.named_parameters()}
        return losses, squares, weights, {k: v.clone() for k, v in state_of(stepper).items()}


def same(got: Outcome, want: Outcome) -> None:
    assert got[0] == want[0]
    assert got[1] == pytest.approx(want[1], rel=1e-3)
    for ours, theirs in ((got[2], want[2]), (got[3], want[3])):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name].cpu(), value.cpu()), name


@pytest.mark.parametrize("family", sorted(MODELS))
def test_streamed_weights_train_to_the_same_bits(toys: Toys, family: str) -> None:
    same(
        trained(family, toys(family), {"swap": "all"}, range(3)),
        trained(family, toys(family), {"recompute": "none"}, range(3)),
    )


@pytest.mark.parametrize(
    "optimizer", [{"kind": "adamw8bit-kahan"}, {"kind": "adamw", "rounding": "stochastic"}, {"kind": "lion"}, {"kind": "adafactor"}]
)
def test_with_any_optimizer_that_steps_weights_one_by_one(toys: Toys, optimizer: dict[str, Any]) -> None:
    memory = {"swap": 4, "room": 1.0, "offload": True, "offload_threshold": 0.001}
    same(trained("wan", toys("wan"), memory, range(2), **optimizer), trained("wan", toys("wan"), {}, range(2), **optimizer))


def test_two_microbatches_in_layer_order_and_a_resumed_run(toys: Toys) -> None:
    layer = {"swap": "all", "order": "layer"}
    unbroken = trained("flux", toys("flux"), layer, range(4), count=2)
    same(unbroken, trained("flux", toys("flux"), {}, range(4), count=2))
    first = trained("flux", toys("flux"), layer, range(2), count=2)
    rest = trained("flux", toys("flux"), layer, range(2, 4), count=2, before=first)
    same((first[0] + rest[0], first[1] + rest[1], rest[2], rest[3]), unbroken)


@pytest.mark.parametrize("memory", [{"swap": "all"}, {"swap": 2, "recompute": "none", "room": 1.0}], ids=["all", "some"])
def test_gradients_wait_for_the_other_microbatches_on_the_host(toys: Toys, memory: dict[str, Any]) -> None:
    same(trained("wan", toys("wan"), memory, range(3), count=3), trained("wan", toys("wan"), {}, range(3), count=3))


APART = {
    "late": ({}, {"offload": True}),
    "early": ({}, {"release": True}),
    "both": ({}, {"release": True, "offload": True}),
    "some-streamed": ({"swap": 2}, {"release": True, "offload": True}),
    "others-late": ({"swap": 2, "order": "layer"}, {"offload": True}),
}


@pytest.mark.parametrize("way", sorted(APART))
def test_blocks_stepped_on_their_own_end_as_if_stepped_together(toys: Toys, way: str) -> None:
    memory, optimizer = APART[way]
    together = trained("flux", toys("flux"), {}, range(4), count=2)
    first = trained("flux", toys("flux"), memory, range(2), count=2, **optimizer)
    rest = trained("flux", toys("flux"), memory, range(2, 4), count=2, before=first, **optimizer)
    same((first[0] + rest[0], first[1] + rest[1], rest[2], rest[3]), together)


@pytest.mark.parametrize(
    ("release", "memory"), [(False, {}), (True, {}), (True, {"compile": True})], ids=["late", "early", "early-compiled"]
)
def test_adapters_of_streamed_blocks_are_stepped_on_their_own(toys: Toys, release: bool, memory: dict[str, Any]) -> None:
    memory, adapter = {"swap": "all", **memory}, {"rank": 4}
    expected = trained("flux", toys("flux"), memory, range(3), adapter=adapter)
    same(trained("flux", toys("flux"), memory, range(3), adapter=adapter, release=release, offload=True), expected)


@pytest.mark.parametrize("frozen", [r"blocks\.[0-2]\.", r"blocks\."], ids=["some", "all"])
def test_streamed_blocks_that_do_not_train_are_saved_as_they_were(toys: Toys, frozen: str) -> None:
    memory, groups = {"swap": "all"}, [{"match": frozen, "lr": 0}]
    config = config_of("wan", toys("wan"), None, memory, optimizer={"clip": None, "groups": groups})
    base = make_model(config.model, config.objective).weights()
    _, _, weights, _ = trained("wan", toys("wan"), memory, range(1), groups=groups)
    kept = {n: w for n, w in weights.items() if re.search(frozen, n)}
    assert kept and all(torch.equal(w, base.read(n, w.dtype)) for n, w in kept.items())


def test_no_gradient_outlives_its_block(toys: Toys) -> None:
    config = config_of("wan", toys("wan"), None, {"swap": "all"}, optimizer={"clip": None})
    model = make_model(config.model, config.objective)
    with open_mesh(config.mesh) as mesh:
        pipeline = build(config, model, mesh)
        part = pipeline.module
        pipeline.memory.release_with(make_optimizer(config.optimizer, part.named_parameters()), mesh.mean_over_replicas)
        pipeline.train([microbatch(model, seed=0, count=1, frames=frames_of(model))])
        held = [n for n, p in part.named_parameters() if p.grad is not None]
    assert held and not any(n.startswith("blocks.") for n in held)


def run_of(folder: Path, name: str, steps: int, lr: float = 1e-3, **memory: Any) -> Config:
    config = prepared("wan", "full", folder, 1)
    changes = {
        "output_dir": folder / name,
        "run": config.run.model_copy(update={"steps": steps}),
        "optimizer": OptimizerConfig(lr=lr, clip=None),
        "memory": MemoryConfig(**memory),
    }
    return config.model_copy(update=changes)


def weights_of(run: Path) -> list[dict[str, Tensor]]:
    return [read_weights(each) for each in list_checkpoints(run / "checkpoints")]


def test_a_streamed_run_that_goes_on_saves_what_an_unbroken_one_does(tmp_path: Path) -> None:
    unbroken = train(run_of(tmp_path, "unbroken", 4), resume=None, make_sinks=list)
    train(run_of(tmp_path, "broken", 2, swap="all"), resume=None, make_sinks=list)
    run = train(run_of(tmp_path, "broken", 4, swap="all"), resume="", make_sinks=list)
    pairs = [(weights_of(run)[-1], weights_of(unbroken)[-1])]
    exported = [*(unbroken / "exports").rglob("*.safetensors")]
    pairs += [(load_file(run / file.relative_to(unbroken)), load_file(file)) for file in exported]
    assert exported
    for got, expected in pairs:
        assert got.keys() == expected.keys() and all(torch.equal(got[name], weight) for name, weight in expected.items())


def test_a_run_whose_gradients_are_not_finite_ends_without_saving_them(tmp_path: Path) -> None:
    config = run_of(tmp_path, "lost", 9, lr=1e20, swap="all")
    with pytest.raises(DiffpipeError, match=r"the gradient of step \d is not finite[\s\S]*--resume from the last checkpoint"):
        train(config, resume=None, make_sinks=list)
    (run,) = config.output_dir.iterdir()
    assert all(weight.isfinite().all() for saved in weights_of(run) for weight in saved.values())


def test_an_optimizer_with_state_for_all_weights_together_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.kind: Prodigy keeps .* for all weights together"):
        check_optimizer(OptimizerConfig(kind="prodigy"), apart=True)


def test_a_norm_that_is_known_only_behind_the_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"optimizer\.clip must be null, found 1"):
        config_of("wan", tmp_path, None, {"swap": "all"})
