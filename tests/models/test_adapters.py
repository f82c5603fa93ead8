"""Adapters of every kind go where the config says, change nothing at first, and read back from any file they were written to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffpipe.config.schema import AdapterConfig, ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError, ConfigError, DiffpipeError
from diffpipe.models import MODELS, make_model
from diffpipe.models.adapter_files import joined_layers, merge_into, name_adapter, read_adapter
from diffpipe.models.adapters import adapter_tensors, attach, check_given, folded, initialise, is_adapter, resolve_targets
from diffpipe.models.base import DiffusionModel
from diffpipe.models.weights import realise
from tests.families import frames_of, microbatch, with_weights

CPU = torch.device("cpu")
KINDS = ("lora", "dora", "lokr")


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest, toys: Callable[[str], Path]) -> DiffusionModel:
    return model_of(request.param, toys)


def model_of(family: str, toys: Callable[[str], Path], **more: Any) -> DiffusionModel:
    return make_model(ModelConfig(family=family, path=str(toys(family)), dtype="float32", **more), ObjectiveConfig())


def adapted(model: DiffusionModel, config: AdapterConfig, given: dict[str, Tensor] | None = None) -> nn.Module:
    """The denoiser with its weights, and adapters at their first values."""
    module = model.load_denoiser()
    attach(module, resolve_targets(model, module, config), config, torch.float32)
    source = model.weights()
    module = with_weights(module, model)
    initialise(module, config, 0, CPU, given, lambda layer: source.read(f"{layer}.weight"))
    return module.eval()


def trained(model: DiffusionModel, config: AdapterConfig) -> nn.Module:
    """The same, moved on as by training."""
    module = adapted(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if is_adapter(name):
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return module


@torch.no_grad()
def output(module: nn.Module, model: DiffusionModel) -> Tensor:
    inputs, _ = microbatch(model, frames=frames_of(model))
    return module(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_all_of_it_trains(model: DiffusionModel, kind: str) -> None:
    config = AdapterConfig(kind=kind, rank=4, alpha=2.0)  # type: ignore[arg-type]
    module = adapted(model, config)
    bare = with_weights(model.load_denoiser(), model).eval()
    torch.testing.assert_close(output(module, model), output(bare, model), rtol=1e-5, atol=1e-5)
    inputs, _ = microbatch(model, frames=frames_of(model))
    module = trained(model, config)
    module(**inputs, return_dict=False)[0].square().mean().backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert gradients.keys() == {n for n, _ in module.named_parameters() if is_adapter(n)}
    silent = {n for n, g in gradients.items() if g is None or not g.any()}
    unreached = {n for n in silent if not any(m.startswith(n.rsplit(".lo", 1)[0]) and m not in silent for m in gradients)}
    # Some blocks end in layers whose output the last block throws away; whole layers, never a part of one.
    assert silent == unreached
    assert len(silent) < len(gradients) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_any_form_reads_back_as_what_was_trained(model: DiffusionModel, tmp_path: Path, kind: str) -> None:
    config = AdapterConfig(kind=kind, rank=4, alpha=2.0)  # type: ignore[arg-type]
    cases = [(config, ("diffusers", "comfyui", "kohya"))]
    if kind == "lokr":  # which the rows of joined layers have no file for under other names
        joined = joined_layers(model, resolve_targets(model, model.load_denoiser(), config))
        others = config.model_copy(update={"exclude": [f"^{name}$" for name in joined]})
        cases = [(config, ("diffusers",)), (others, ("comfyui", "kohya"))]
    for case, forms in cases:
        module = trained(model, case)
        wanted = output(module, model)
        for form in forms:
            file = tmp_path / f"{form}.safetensors"
            named = name_adapter(folded(adapter_tensors(module), case), model, form)
            save_file({n: t.contiguous() for n, t in named.items()}, file)
            again = adapted(model, case, read_adapter(file, model))
            torch.testing.assert_close(output(again, model), wanted, rtol=1e-4, atol=1e-5, msg=lambda told, form=form: f"{form}: {told}")


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_output_of_the_adapted_model(
    model: DiffusionModel, toys: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    config = AdapterConfig(kind=kind, rank=4, alpha=2.0)  # type: ignore[arg-type]
    module = trained(model, config)
    file = tmp_path / "adapter.safetensors"
    save_file({n: t.contiguous() for n, t in name_adapter(folded(adapter_tensors(module), config), model, "diffusers").items()}, file)
    merged = model_of(model.name, toys, merge=[{"path": file}])
    torch.testing.assert_close(
        output(with_weights(merged.load_denoiser(), merged).eval(), model), output(module, model), rtol=1e-4, atol=1e-5
    )
    none = model_of(model.name, toys, merge=[{"path": file, "weight": 0.0}])
    bare = with_weights(model.load_denoiser(), model).eval()
    torch.testing.assert_close(output(with_weights(none.load_denoiser(), none).eval(), model), output(bare, model), rtol=1e-5, atol=1e-6)


def test_a_foreign_alpha_is_honoured(toys: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_of("wan", toys)
    config = AdapterConfig(rank=4)
    tensors = adapter_tensors(trained(model, config))
    named = name_adapter(tensors, model, "kohya")
    file = tmp_path / "kohya.safetensors"
    save_file({n: torch.tensor(1.0) if n.endswith(".alpha") else t.contiguous() for n, t in named.items()}, file)
    read = read_adapter(file, model)
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor / 4 if ".lora_B." in name else tensor)


@pytest.mark.parametrize("kept", ["header", "beside"])
@pytest.mark.parametrize(
    ("told", "query", "value"),
    [
        ({"lora_alpha": 8}, 2.0, 2.0),
        ({"lora_alpha": 4, "alpha_pattern": {"attn2.to_v": 1}}, 1.0, 0.25),
        ({"lora_alpha": 4, "use_rslora": True}, 2.0, 2.0),
    ],
    ids=["one", "pattern", "rslora"],
)
def test_a_scale_that_only_diffusers_header_or_pefts_config_tells_is_honoured(
    toys: Callable[[str], Path], tmp_path: Path, told: dict[str, Any], query: float, value: float, kept: str
) -> None:
    model = model_of("wan", toys)
    layers = {"blocks.0.attn1.to_q": query, "blocks.1.attn2.to_v": value}
    tensors = {f"{layer}.lora_{side}.weight": torch.randn(64, 4) for layer in layers for side in "AB"}
    tensors = {n: t.T.contiguous() if ".lora_A." in n else t for n, t in tensors.items()}
    settings = {"peft_type": "LORA", "r": 4, "rank_pattern": {}, "alpha_pattern": {}, **told}
    file = tmp_path / "adapter_model.safetensors"
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in settings.items()})}
    save_file({f"transformer.{n}": t for n, t in tensors.items()}, file, header if kept == "header" else None)
    if kept == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    read = read_adapter(file, model)
    for layer, scale in layers.items():
        torch.testing.assert_close(read[f"{layer}.lora_B.weight"], tensors[f"{layer}.lora_B.weight"] * scale)


def test_ranks_go_by_pattern_and_keep_the_scale_at_one(toys: Callable[[str], Path]) -> None:
    model = model_of("flux", toys)
    config = AdapterConfig(rank=2, ranks={r"attn\.to_q$": 6, "attn": 3})
    module = adapted(model, config)
    shapes = {n: t.shape for n, t in adapter_tensors(module).items()}
    assert shapes["transformer_blocks.0.attn.to_q.lora_A.weight"][0] == 6
    assert shapes["transformer_blocks.0.attn.to_k.lora_A.weight"][0] == 3
    assert shapes["transformer_blocks.0.ff.net.2.lora_A.weight"][0] == 2
    layer: Any = module.get_submodule("transformer_blocks.0.attn.to_q")
    assert layer.scaling == {"default": 1.0}
    with pytest.raises(ConfigError, match=r"adapter\.ranks: 'atn' finds no linear layer"):
        resolve_targets(model, model.load_denoiser(), AdapterConfig(ranks={"atn": 3}))


def test_targets_go_by_pattern_and_name_what_was_meant(toys: Callable[[str], Path]) -> None:
    model = model_of("flux", toys)
    module = model.load_denoiser()
    chosen = resolve_targets(model, module, AdapterConfig(targets=[r"^x_embedder$", r"blocks\.0\.attn\.to_[qk]$"], exclude=["^single"]))
    assert sorted(chosen) == ["transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_q", "x_embedder"]
    with pytest.raises(ConfigError, match=r"adapter\.targets: 'to_qq' finds no linear layer\n.*to_q"):
        resolve_targets(model, module, AdapterConfig(targets=["to_qq"]))


def test_a_file_of_another_family_or_rank_is_refused(toys: Callable[[str], Path], tmp_path: Path) -> None:
    flux, wan = model_of("flux", toys), model_of("wan", toys)
    config = AdapterConfig(rank=4)
    file = tmp_path / "flux.safetensors"
    save_file({n: t.contiguous() for n, t in name_adapter(adapter_tensors(trained(flux, config)), flux, "diffusers").items()}, file)
    with pytest.raises(CheckpointError, match=r"is no layer of Wan"):
        read_adapter(file, wan)
    with pytest.raises(CheckpointError, match=r"wants \(8, .*the file has \(4,"):
        adapted(flux, AdapterConfig(rank=8), read_adapter(file, flux))
    tensors = load_file(file)
    tensors.pop(next(n for n in tensors if ".lora_A." in n))
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"has no lora_A\.weight"):
        read_adapter(file, flux)
    save_file({"blocks.0.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="is no tensor of an adapter"):
        read_adapter(file, flux)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("lora", {"targets": [r"attn\.to_q$"]}, r"has \S+lora_A\.weight and \d+ more tensors, which the adapter has no place for"),
        ("dora", {}, r"has \S+lora_magnitude_vector and \d+ more"),
    ],
)
def test_a_file_of_which_a_part_has_no_place_is_refused(
    toys: Callable[[str], Path], tmp_path: Path, kind: Any, changes: dict[str, Any], told: str
) -> None:
    flux = model_of("flux", toys)
    given = adapter_tensors(trained(flux, AdapterConfig(kind=kind, rank=4)))
    config = AdapterConfig(rank=4, init=tmp_path / "adapter.safetensors", **changes)
    with pytest.raises(CheckpointError, match=rf"adapter\.safetensors: {told}"):
        check_given(adapted(flux, config), config, given)


def test_a_file_for_another_size_of_the_model_is_refused(toys: Callable[[str], Path], tmp_path: Path) -> None:
    flux, file = model_of("flux", toys), tmp_path / "wide.safetensors"
    layers = {"lora_unet_double_blocks_0_img_attn_qkv": (100, 64), "lora_unet_double_blocks_0_img_attn_proj": (64, 80)}
    told = (r"img_attn\.qkv as a layer of 64 to 100\n  expected: 64 to 192", r"to_out\.0 as a layer of 80 to 64\n  expected: 64 to 64")
    for (layer, (rows, columns)), message in zip(layers.items(), told, strict=True):
        save_file({f"{layer}.lora_up.weight": torch.ones(rows, 4), f"{layer}.lora_down.weight": torch.ones(4, columns)}, file)
        with pytest.raises(CheckpointError, match=message):
            model_of("flux", toys, merge=[{"path": file}]).weights()
    save_file(
        {
            f"{layer}.lora_down.weight": torch.ones(4, 64),
            f"{layer}.lora_up.weight": torch.ones(64, 4),
            f"{layer}.dora_scale": torch.ones(1, 64),
        },
        file,
    )
    with pytest.raises(CheckpointError, match="has a magnitude for each of 64 inputs"):
        read_adapter(file, flux)


def test_an_adapter_of_a_convolution_is_merged_as_its_formula_has_it() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, first, second = (torch.randn(shape, generator=generator) for shape in ((6, 4, 3, 3), (3, 2), (2, 2, 3, 3)))
    merged = merge_into({"a.weight": weight}, {"a.lokr_w1": first, "a.lokr_w2": second}, 1.0, "")["a.weight"]
    expected = weight + torch.einsum("ab,oihw->aobihw", first, second).reshape(weight.shape)
    torch.testing.assert_close(realise(merged), expected)
    down, up, magnitude = (torch.randn(shape, generator=generator) for shape in ((2, 4, 3, 3), (6, 2, 1, 1), (6,)))
    lora = {"a.lora_A.weight": down, "a.lora_B.weight": up, "a.lora_magnitude_vector": magnitude}
    changed = weight + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    expected = changed * (magnitude / changed.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(realise(merge_into({"a.weight": weight}, lora, 1.0, "")["a.weight"]), expected)


def test_a_lokr_over_joined_layers_cannot_take_original_names(toys: Callable[[str], Path]) -> None:
    flux = model_of("flux", toys)
    tensors = folded(adapter_tensors(trained(flux, AdapterConfig(kind="lokr", rank=4))), AdapterConfig(kind="lokr", rank=4))
    with pytest.raises(DiffpipeError, match=r"a LoKr cannot follow"):
        name_adapter(tensors, flux, "comfyui")
