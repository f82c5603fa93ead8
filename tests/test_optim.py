"""Optimizers by name: each trains, goes on exactly from its saved state, and loses no small step where it says so."""

from __future__ import annotations

import copy
from collections import deque
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from pytorch_optimizer import get_supported_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from diffpipe.checkpoint import Checkpoints, load
from diffpipe.config.schema import CheckpointConfig, MeshConfig, OptimizerConfig
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.optim import caution, make_optimizer, rate_of, set_rates
from diffpipe.optim.named import SPECIAL
from diffpipe.optim.state import restore_state, state_of
from diffpipe.pipeline.mesh import open_mesh

KINDS: list[dict[str, Any]] = [
    {"kind": "adamw"},
    {"kind": "adamw", "rounding": "stochastic"},
    {"kind": "adamw8bit"},
    {"kind": "adamw8bit-kahan"},
    {"kind": "prodigy", "lr": 1.0},
    {"kind": "adafactor"},
    {"kind": "muon"},
    {"kind": "lion", "betas": (0.9, 0.95)},
    {"kind": "came", "options": {"betas": (0.9, 0.99, 0.999)}},
    {"kind": "soap"},
    {"kind": "shampoo"},
]


def module_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).to(dtype)


def optimizer_of(module: nn.Module, **config: Any) -> Optimizer:
    return make_optimizer(OptimizerConfig(**{"lr": 1e-2, **config}), module.named_parameters())


def run(module: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).to(next(module.parameters()).dtype)
        (module(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", KINDS, ids=lambda c: "-".join(map(str, c.values())))
def test_it_trains_and_goes_on_exactly_from_its_saved_state(config: dict[str, Any], dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and config["kind"] in ("came", "soap", "shampoo"):
        pytest.skip("the package's own does not step bfloat16 weights")
    whole = module_of(dtype)
    before = weights(whole)
    optimizer = optimizer_of(whole, **config)
    run(whole, optimizer, 0, 3)
    kept, state = weights(whole), {name: t.clone() for name, t in state_of(optimizer).items()}
    run(whole, optimizer, 3, 6)
    assert all(not torch.equal(p, before[n]) for n, p in weights(whole).items())
    other = module_of(dtype)
    other.load_state_dict(kept)
    fresh = optimizer_of(other, **config)
    restore_state(fresh, state)
    run(other, fresh, 3, 6)
    for name, p in weights(other).items():
        assert torch.equal(p, weights(whole)[name]), name


def test_every_optimizer_of_the_package_trains_or_is_refused_with_its_key() -> None:
    torch.manual_seed(0)
    refused = set()
    for kind in get_supported_optimizers():
        module = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
        try:
            optimizer = optimizer_of(module, kind=kind)
        except ConfigError as fault:
            assert fault.where in ("optimizer.kind", "optimizer.options")
            refused.add(kind)
            continue
        before = weights(module)
        for _ in range(12):
            (module(torch.randn(8, 16)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any(not torch.equal(p, before[n]) for n, p in weights(module).items()), kind
        other = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16))
        other.load_state_dict(module.state_dict())
        fresh = optimizer_of(other, kind=kind)
        restore_state(fresh, {name: t.clone() for name, t in state_of(optimizer).items()})
        for each, by in ((module, optimizer), (other, fresh)):
            torch.manual_seed(1)  # some draw numbers
            for _ in range(6):
                (each(torch.randn(8, 16)) - 2).square().mean().backward()
                set_rates(by, 1.0)  # as each step of a run does; ASGD takes the rate for its own
                by.step()
                by.zero_grad()
        assert all(torch.equal(p, weights(module)[n]) for n, p in weights(other).items()), kind
    # Ranger21 asks for an option that has no default; the last four train other weights than they mean to be used.
    assert refused == {*SPECIAL, "ranger21", "schedulefreeadamw", "schedulefreeradam", "schedulefreesgd", "splus"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_parameters_stepped_together_move_as_the_library_moves_each_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = nn.ModuleList([nn.Linear(256, n) for n in (16, 32, 48, 3, 4096)]).to(dtype)
    alone = copy.deepcopy(packed)
    ours = optimizer_of(packed, kind="adamw8bit", weight_decay=0.1, lr=1e-2)
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in alone.parameters()]
    library = bitsandbytes.optim.AdamW8bit(groups, lr=1e-2)
    for step in range(5):
        for p, q in zip(packed.parameters(), alone.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
            if step == 2 and p.shape[0] == 32:
                p.grad = q.grad = None  # from now on a step behind the others
        ours.step()
        library.step()
    storages = {ours.state[p]["state1"].untyped_storage().data_ptr() for p in packed.parameters() if p.shape[0] in (16, 48)}
    assert len(storages) < 4, "what is stepped together lies together"
    for (name, p), q in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q), name
        for what, value in library.state[q].items():
            assert ours.state[p][what] == value if isinstance(value, int) else torch.equal(ours.state[p][what], value), (name, what)


def drift(kind: dict[str, Any], dtype: torch.dtype, steps: int = 200) -> Tensor:
    """How far weights of 1 are moved by steps each too small for bfloat16, whose next number below is 2^-8 away."""
    module = nn.Linear(256, 64, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    module.to(dtype)
    optimizer = optimizer_of(module, **{"lr": 1e-4, "weight_decay": 1.0, **kind})
    for _ in range(steps):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
    return 1 - module.weight.detach().float()


def test_a_run_goes_on_with_another_optimizer_from_the_weights_alone(tmp_path: Path) -> None:
    def made(config: OptimizerConfig) -> tuple[nn.Linear, Optimizer]:
        layer = nn.Linear(8, 8)
        layer(torch.ones(1, 8)).square().sum().backward()
        return layer, make_optimizer(config, layer.named_parameters())

    adamw, others = OptimizerConfig(), [OptimizerConfig(kind="adamw8bit"), OptimizerConfig(rounding="stochastic")]
    first, optimizer = made(adamw)
    optimizer.step()
    with open_mesh(MeshConfig()) as mesh:
        checkpoints = Checkpoints(tmp_path, mesh, CheckpointConfig(), pinned=False)
        checkpoints.save(1, first, optimizer, {"rule": adamw.rule})
        saved = checkpoints.finish()
        assert saved is not None
        for config in [adamw, *others]:
            layer, optimizer = made(config)
            assert load(saved.path, layer, optimizer, config.rule, mesh)["rule"] == "adamw"
            assert torch.equal(layer.weight, first.weight) and bool(optimizer.state) == (config is adamw)
            optimizer.step()


def test_small_steps_and_decay_move_16_bit_weights_where_the_optimizer_says_so() -> None:
    exact = drift({"kind": "adamw"}, torch.float32).mean().item()
    assert exact == pytest.approx(0.0394, rel=0.02)  # 200 steps of 1e-4, and as much decay
    for lossy in ({"kind": "adamw"}, {"kind": "adamw8bit"}):
        assert drift(lossy, torch.bfloat16).abs().max() < 0.005
    assert drift({"kind": "adamw8bit-kahan"}, torch.bfloat16).mean().item() == pytest.approx(exact, abs=2**-8)
    rounded = drift({"kind": "adamw", "rounding": "stochastic"}, torch.bfloat16)
    assert rounded.mean().item() == pytest.approx(exact, rel=0.02)
    assert rounded.std() > 0  # by chance, weight by weight
    assert torch.equal(rounded, drift({"kind": "adamw", "rounding": "stochastic"}, torch.bfloat16)), "replicas draw alike"


@pytest.mark.parametrize("kind", ["adafactor", "came", "lion", "muon"])
def test_the_rate_and_its_schedule_decide_how_far_weights_move(kind: str) -> None:
    def moved(scale: float) -> float:
        module = module_of()
        before, optimizer = weights(module), optimizer_of(module, kind=kind)
        set_rates(optimizer, scale)
        run(module, optimizer, 0, 1)
        return sum((p - before[n]).norm().item() for n, p in weights(module).items())

    assert moved(0.1) == pytest.approx(0.1 * moved(1.0), rel=1e-2)


@pytest.mark.parametrize("kind", ["prodigy", "dadaptadam"])
def test_the_rate_told_is_what_the_optimizer_has_found(kind: str) -> None:
    module = module_of()
    optimizer = optimizer_of(module, kind=kind, lr=1.0)
    set_rates(optimizer, 0.5)
    assert rate_of(optimizer) == pytest.approx(0.5e-6), "the package's first guess is 1e-6"
    run(module, optimizer, 0, 20)
    assert rate_of(optimizer) > 2e-6


@pytest.mark.parametrize(("kind", "alike"), [("prodigy", False), ("adai", False), ("adafactor", True), ("muon", True)])
def test_a_kind_that_stages_step_otherwise_than_one_process_is_told_of(kind: str, alike: bool) -> None:
    whole, parts = module_of(), module_of()
    config = {"kind": kind, "lr": 1.0}
    together = [optimizer_of(whole, **config)]
    apart = [make_optimizer(OptimizerConfig(**config), [(n, p)]) for n, p in parts.named_parameters()]
    for step in range(12):
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) + p.ndim
            q.grad = p.grad.clone()
        for optimizer in (*together, *apart):
            optimizer.step()
    found = weights(parts)
    assert all(torch.allclose(p, found[n], rtol=1e-4) for n, p in weights(whole).items()) == alike
    assert (caution(OptimizerConfig(**config), 2) is None) == alike and caution(OptimizerConfig(**config), 1) is None


def test_stochastic_rounding_changes_no_float32_step() -> None:
    plain, rounded = module_of(), module_of()
    run(plain, optimizer_of(plain, kind="adamw"), 0, 5)
    run(rounded, optimizer_of(rounded, kind="adamw", rounding="stochastic"), 0, 5)
    for name, p in weights(plain).items():
        torch.testing.assert_close(weights(rounded)[name], p, rtol=1e-5, atol=1e-6)


def test_an_object_that_no_checkpoint_can_hold_is_told_when_it_would_be_written() -> None:
    module = module_of()
    optimizer = optimizer_of(module, kind="lion")
    run(module, optimizer, 0, 1)
    optimizer.state[next(module.parameters())]["odd"] = deque([1])
    with pytest.raises(CheckpointError, match=r"optimizer: Lion keeps a deque in its state"):
        state_of(optimizer)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"kind": "prodgy"}, r"optimizer\.kind: there is no optimizer 'prodgy'[\s\S]*did you mean prodigy"),
        ({"kind": "adamw8bit-kahn"}, r"optimizer\.kind: there is no optimizer 'adamw8bit-kahn'[\s\S]*did you mean adamw8bit-kahan"),
        ({"kind": "prodigy", "options": {"d_0": 1}}, r"optimizer\.options: prodigy has no option 'd_0'\n  expected: .*d0"),
        ({"kind": "adafactor", "eps": 1e-6, "options": {"params": 1}}, r"optimizer\.(options|eps): adafactor has no option"),
        ({"kind": "lion", "options": {"betas": 3}}, r"optimizer\.options: lion refuses its options"),
        ({"kind": "adamw", "options": {"fused": True}}, r"optimizer\.options: adamw has no options"),
        ({"kind": "lion", "rounding": "stochastic"}, r"optimizer\.rounding: lion rounds to the nearest"),
        ({"kind": "prodigy", "groups": [{"match": "0", "lr": 0.5}]}, r"optimizer\.groups: prodigy finds one rate[\s\S]*others: 0\.5"),
        ({"kind": "lbfgs"}, r"optimizer\.kind: lbfgs cannot be used here"),
    ],
)
def test_a_mistake_is_told_with_its_key(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        optimizer_of(module_of(), **config)
