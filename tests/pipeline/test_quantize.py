"""Weights in few bits: near what they stand for, multiplied as they stand, and no reason to keep activations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from diffpipe.config.schema import Config, MemoryConfig
from diffpipe.errors import ConfigError
from diffpipe.models import MODELS, make_model
from diffpipe.models.weights import WeightSource
from diffpipe.pipeline.build import build
from diffpipe.pipeline.memory.quantize import quantize
from diffpipe.pipeline.memory.quantize.fp7 import Fp7Linear
from diffpipe.pipeline.memory.quantize.fp8 import FEW, BlockFp8Linear, Fp8Linear, PlainFp8Linear
from diffpipe.pipeline.memory.quantize.frozen import FrozenLinear
from diffpipe.pipeline.memory.quantize.nf4 import Nf4Linear
from diffpipe.pipeline.memory.tags import Cut
from diffpipe.pipeline.mesh import open_mesh
from tests.families import frames_of, microbatch
from tests.pipeline.test_memory import POLICIES, config_of, same, steps_of

Toys = Callable[[str], Path]
BY_ROW = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # earlier ones scale fp8 products by row on CUDA only
KINDS = ["fp8", "fp8-plain", "fp8-block", "fp7", "nf4"]
MAKERS: dict[str, Callable[[nn.Linear], FrozenLinear]] = {
    "fp8": lambda inner: Fp8Linear(inner, products=False),
    "fp8-plain": lambda inner: PlainFp8Linear(inner, products=False),
    "fp8-block": BlockFp8Linear,
    "fp7": lambda inner: Fp7Linear(inner, products=False),
    "nf4": Nf4Linear,
    "fp7-products": lambda inner: Fp7Linear(inner, products=True),
    "products": lambda inner: Fp8Linear(inner, products=True),
}


def layer_of(kind: str, plain: nn.Linear) -> FrozenLinear:
    """A linear layer's weight kept in few bits."""
    layer = MAKERS[kind](plain)
    encoded = layer.encoded(WeightSource({"weight": plain.weight.detach()}, Path("none")), "weight", torch.device("cpu"))
    for leaf, value in encoded.items():
        setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
    return layer


def plain_layer(rows: int = 512, columns: int = 256) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows).requires_grad_(False)


def passed(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output, and the gradient of its input."""
    given = x.clone().requires_grad_()
    out = layer(given)
    out.square().mean().backward()
    assert given.grad is not None
    return out.detach(), given.grad


# e4m3 keeps three bits after the first: each value is off by at most 1/16, about 2.6 % of its size on average. nf4 keeps 16
# values: about 9 %. In products both factors are rounded.
@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("fp8", 0.03),
        ("fp8-plain", 0.04),
        ("fp8-block", 0.03),
        ("nf4", 0.1),
        ("fp7", 0.03),
        *(pytest.param(k, 0.045, marks=pytest.mark.skipif(not BY_ROW, reason="needs CUDA")) for k in ("products", "fp7-products")),
    ],
)
def test_output_and_gradient_are_near_those_of_the_weight(kind: str, limit: float) -> None:
    plain = plain_layer()
    x = torch.randn(2 * FEW, 256, generator=torch.Generator().manual_seed(1))
    for got, wanted in zip(passed(layer_of(kind, plain), x), passed(plain, x), strict=True):
        assert (got - wanted).norm() / wanted.norm() < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_with_the_weight_that_it_tells(kind: str, dtype: torch.dtype) -> None:
    # Neither side a multiple of a block.
    layer = layer_of(kind, plain_layer(200, 144).to(dtype))
    told = nn.Linear(144, 200).requires_grad_(False)
    told.weight, told.bias = nn.Parameter(layer.weight, requires_grad=False), layer.bias
    assert told.weight.dtype == dtype
    x = torch.randn(3, 5, 144, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(passed(layer, x), passed(told, x), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_in_the_type_that_autocast_says(kind: str) -> None:
    layer = layer_of(kind, plain_layer())
    x = torch.randn(2 * FEW, 256, generator=torch.Generator().manual_seed(1))
    wanted = passed(layer, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = passed(layer, x)
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", ["fp8", "fp8-plain", "fp8-block", "fp7"])
def test_fp8_weights_are_the_same_whatever_type_they_are_brought_to(kind: str) -> None:
    plain = plain_layer()
    plain.weight[128:256, :128] *= 2.0**-20  # a row and a block of values that float16 hardly has
    layer = layer_of(kind, plain)
    exact = layer.dequantized(torch.float32)
    assert torch.equal(layer.dequantized(torch.bfloat16).float(), exact)
    assert torch.equal(layer.dequantized(torch.float16), exact.half())


def test_seven_bits_stand_for_a_weight_as_near_as_eight_and_take_an_eighth_less() -> None:
    plain = plain_layer()
    plain.weight[::7, ::31] *= 20  # as trained weights have
    eight, seven = layer_of("fp8", plain), layer_of("fp7", plain)
    assert seven.codes.nbytes * 8 == eight.codes.nbytes * 7
    errors = [(layer.weight - plain.weight).norm() for layer in (seven, eight)]
    assert errors[0] < 1.02 * errors[1]


def test_every_value_of_seven_bits_comes_back_as_it_went() -> None:
    spaced = torch.arange(8) / 2
    normal = torch.tensor([2.0 ** (e - 2) * (8 + m) for e in range(1, 8) for m in range(8)][:-1])  # the last is no value of e4m3
    values = torch.cat([spaced, normal, -spaced, -normal, torch.zeros(2)])
    plain = nn.Linear(128, 1).requires_grad_(False)
    plain.weight[0] = values  # up to 448: the scale is one
    assert torch.equal(layer_of("fp7", plain).weight[0], values)


def test_rows_that_seven_bits_do_not_fill_are_kept_in_eight(toys: Toys) -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(32, 24, device="meta"), nn.Linear(24, 32, device="meta"))]).requires_grad_(False)
    config = config_of("flux", toys("flux"), {"rank": 4}, {"quantize": "fp7"})
    quantize(model, ["0"], config.memory, make_model(config.model, config.objective), multiplies=False)
    assert [type(layer) for layer in model[0]] == [Fp7Linear, Fp8Linear]


def test_a_weight_beyond_what_e4m3_holds_is_refused_unless_scaled() -> None:
    plain = plain_layer()
    plain.weight[3, 5] = 449
    with pytest.raises(ConfigError, match=r"memory\.quantize: fp8-plain: weight has values up to 449[\s\S]*fix: set it to fp8"):
        layer_of("fp8-plain", plain)
    for kind in ("fp8", "fp8-block", "fp7"):
        # The scale is a power of two, here 2, which brings 449 between codes that are 16 apart.
        assert layer_of(kind, plain).weight[3, 5] == 448


def saved_by(forward: Callable[[Tensor], Tensor], x: Tensor, policy: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what a function compiled under a policy keeps for its backward pass; nothing is run."""
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        (outputs,) = next(n for n in graph.graph.nodes if n.op == "output").args
        values = [o.meta["val"] for o in outputs]
        kept.extend((tuple(v.shape), v.dtype) for v in values[1:])  # after what the function returns

        def run(_: Any) -> list[Tensor]:
            return [torch.zeros(v.shape, dtype=v.dtype) for v in values]

        run._boxed_call = True  # type: ignore[attr-defined] - how such a callable says that it takes one list
        return run

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=Cut(policy))
    torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)(x)
    return kept


@pytest.mark.parametrize("kind", ["products", "fp7-products", *KINDS])
def test_a_compiled_block_that_is_recomputed_keeps_no_result(kind: str) -> None:
    layer = layer_of(kind, plain_layer())
    kept = saved_by(lambda x: torch.relu(layer(x)), torch.randn(2 * FEW, 256, requires_grad=True), "block")
    assert ((2 * FEW, 256), torch.float32) in kept and ((2 * FEW, 512), torch.float32) not in kept


@pytest.mark.parametrize("kind", ["products", "fp7-products", *KINDS])
def test_a_compiled_block_that_is_not_recomputed_keeps_codes_and_no_weight(kind: str) -> None:
    layer = layer_of(kind, plain_layer())
    kept = saved_by(lambda x: torch.relu(layer(x)), torch.randn(2 * FEW, 256, requires_grad=True), "none")
    assert (tuple(layer.codes.shape), layer.codes.dtype) in kept
    assert ((512, 256), torch.float32) not in kept


# -- in a model ------------------------------------------------------------------------------------------------------


def frozen_layers(config: Config) -> dict[str, FrozenLinear]:
    """The layers in few bits of a built pipeline, by diffusers name."""
    with open_mesh(config.mesh) as mesh:
        part = build(config, make_model(config.model, config.objective), mesh).module
        return {n.removesuffix(".base_layer"): m for n, m in part.named_modules() if isinstance(m, FrozenLinear)}


@pytest.mark.parametrize(("family", "kind"), [*(("flux", kind) for kind in KINDS), ("sdxl", "fp8-block"), ("wan", "fp8"), ("wan", "nf4")])
def test_a_model_trains_as_one_whose_file_holds_the_rounded_weights(toys: Toys, tmp_path: Path, family: str, kind: str) -> None:
    config = config_of(family, toys(family), {"rank": 4}, {"quantize": kind})
    layers = frozen_layers(config)
    assert layers
    model = make_model(config.model, config.objective)
    source = model.weights()
    prefix = "unet." if family == "sdxl" else ""
    rounded = {n.removeprefix(prefix): source.read(n, torch.float32) for n in source.names()}
    rounded |= {f"{n.removeprefix(prefix)}.weight": layer.weight for n, layer in layers.items()}
    save_file(rounded, tmp_path / "rounded.safetensors")
    given = config.model.model_copy(update={"files": {model.component: tmp_path / "rounded.safetensors"}})
    plain = config.model_copy(update={"model": given, "memory": MemoryConfig()})
    for (loss, gradients, held), (wanted, expected, told) in zip(steps_of(config, rounds=1), steps_of(plain, rounds=1), strict=True):
        assert (loss, held) == pytest.approx((wanted, told), rel=1e-6)
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", sorted(MODELS))
def test_layers_that_the_family_keeps_or_that_train_stay_as_they_are(toys: Toys, family: str) -> None:
    config = config_of(family, toys(family), {"rank": 4}, {"quantize": "fp8"})
    model = make_model(config.model, config.objective)
    module = model.load_denoiser()
    units = [
        n
        for n, _ in module.named_modules()
        if any(n == u or (u.endswith(".*") and n.rpartition(".")[0] == u[:-2]) for u in model.spec.units)
    ]
    linear = {n for n, m in module.named_modules() if type(m) is nn.Linear}
    inside = {n for n in linear if any(n.startswith(f"{u}.") for u in units)}
    trained = next(iter(inside))
    module.get_submodule(trained).requires_grad_(True)
    changed = set(quantize(module, units, config.memory, model, multiplies=False))
    assert changed <= inside - {trained}
    left = {n for n in inside - changed if n != trained}
    assert len(left) < len(changed) and all("norm" in n or "time_emb" in n for n in left)
    assert all(type(module.get_submodule(n)) is nn.Linear for n in linear - changed)


@pytest.mark.parametrize(
    ("kind", "adapter"), [*((kind, "lora") for kind in KINDS), ("fp8", "dora"), ("nf4", "dora"), ("fp8-plain", "lokr")]
)
def test_no_policy_changes_a_number_of_layers_in_few_bits(toys: Toys, kind: str, adapter: str) -> None:
    config = config_of("wan", toys("wan"), {"rank": 4, "kind": adapter}, {"quantize": kind, "recompute": "none"})
    moved = config.model_copy(update={"memory": MemoryConfig(**{**POLICIES["everything"], "quantize": kind})})  # type: ignore[arg-type]
    same(steps_of(moved, rounds=2), steps_of(config, rounds=2))


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_new_dora_changes_nothing(toys: Toys, kind: str) -> None:
    losses = []
    for adapter in ("lora", "dora"):
        config = config_of("wan", toys("wan"), {"rank": 4, "kind": adapter}, {"quantize": kind})
        losses.append(first_loss(config))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def first_loss(config: Config) -> float:
    """The loss of the first step, adapters as a run starts with."""
    model = make_model(config.model, config.objective)
    with open_mesh(config.mesh) as mesh:
        return build(config, model, mesh).train([microbatch(model, count=1, frames=frames_of(model))]).item()


def test_nf4_without_bitsandbytes_says_what_to_install(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed here[\s\S]*fix: pip install bitsandbytes"):
        frozen_layers(config_of("wan", toys("wan"), {"rank": 4}, {"quantize": "nf4"}))


def test_products_on_a_device_without_them_are_refused(toys: Toys) -> None:
    with pytest.raises(ConfigError, match=r"memory\.products: the device does not multiply fp8"):
        frozen_layers(config_of("wan", toys("wan"), {"rank": 4}, {"quantize": "fp8", "products": True}))
