"""Files that are fp8 already: their bits are trained on as they are, under whatever names and however joined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpipe.config.schema import Config, MergeConfig
from diffpipe.errors import CheckpointError
from diffpipe.models import MODELS, make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.models.names import to_original
from diffpipe.models.weights import realise
from diffpipe.pipeline.memory.quantize.fp8 import FP8, LARGEST, Fp8Linear
from diffpipe.pipeline.memory.quantize.frozen import FrozenLinear
from tests.pipeline.test_memory import config_of
from tests.pipeline.test_quantize import frozen_layers

Toys = Callable[[str], Path]


def config_with(family: str, toys: Toys, file: Path, kind: str) -> Config:
    config = config_of(family, toys(family), {"rank": 4}, {"quantize": kind})
    component = make_model(config.model, config.objective).component
    return config.model_copy(update={"model": config.model.model_copy(update={"files": {component: file}})})


def originals_of(family: str, toys: Toys) -> tuple[DiffusionModel, dict[str, Tensor]]:
    """A tiny model, and its denoiser's weights under the original names."""
    model = make_model(config_of(family, toys(family), None, {}).model, config_of(family, toys(family), None, {}).objective)
    source = model.weights().tensors
    return model, {n: realise(t).clone().contiguous() for n, t in to_original(source, model.original_names()).items()}


def as_comfyui(tensors: dict[str, Tensor], words: tuple[str, str], marker: bool) -> dict[str, Tensor]:
    """Every second matrix with one scale, the others with one for each row; scales are no powers of two.

    Args:
        words: what the scale of a weight and that of a layer's input are called.
        marker: a tensor whose type says how the file is quantised, as the older format has it.
    """
    made: dict[str, Tensor] = {}
    matrices = [n for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2]
    for name, tensor in tensors.items():
        if name not in matrices:
            made[name] = tensor.to(torch.bfloat16)
            continue
        whole = matrices.index(name) % 2 == 0
        scale = (tensor.abs().amax() if whole else tensor.abs().amax(1, keepdim=True)).float().clamp(min=1e-6) / LARGEST
        made |= {name: (tensor.float() / scale).to(FP8), f"{name.removesuffix('weight')}{words[0]}": scale}
        made[f"{name.removesuffix('weight')}{words[1]}"] = torch.tensor(0.5)
    return made | ({"scaled_fp8": torch.empty(0, dtype=FP8)} if marker else {})


def taken(model: DiffusionModel, layers: dict[str, FrozenLinear]) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales that layers keep, by the original names of the weights whose every row is in some."""
    names = {o: ps for o, ps in model.original_names().items() if all(f"{p.name.removesuffix('.weight')}" in layers for p in ps)}
    names = {o: ps for o, ps in names.items() if o.endswith(".weight")}
    codes = {f"{n}.weight": layer.codes.view(torch.uint8) for n, layer in layers.items()}
    scales = {f"{n}.weight": layer.get_parameter("scale") for n, layer in layers.items()}
    by_name = to_original(scales, names)
    return {n: (t, by_name[n]) for n, t in to_original(codes, names).items()}


@pytest.mark.parametrize("family", sorted(MODELS))
def test_bits_and_scales_of_a_comfyui_file_are_those_that_layers_keep(toys: Toys, tmp_path: Path, family: str) -> None:
    model, tensors = originals_of(family, toys)
    file = as_comfyui(tensors, ("scale_weight", "scale_input"), marker=True)
    save_file({model.prefixes[0] + n: t for n, t in file.items()}, tmp_path / "scaled.safetensors")
    got = taken(model, frozen_layers(config_with(family, toys, tmp_path / "scaled.safetensors", "fp8")))
    assert len(got) > 4
    for name, (codes, scale) in got.items():
        assert torch.equal(codes, file[name].view(torch.uint8)), name
        assert torch.equal(scale, file[f"{name.removesuffix('weight')}scale_weight"].reshape(-1).expand(len(scale))), name


@pytest.mark.parametrize("kind", ["fp8", "fp8-plain", "fp8-block"])
@pytest.mark.parametrize("form", ["newer", "bare"])
def test_every_fp8_kind_takes_the_bits_of_a_file(toys: Toys, tmp_path: Path, kind: str, form: str) -> None:
    model, tensors = originals_of("flux", toys)  # whose file joins q, k, v and more
    if form == "newer":
        file = as_comfyui(tensors, ("weight_scale", "input_scale"), marker=False)
    else:
        file = {n: t.to(FP8) if n.endswith(".weight") and t.ndim == 2 else t for n, t in tensors.items()}
    save_file(file, tmp_path / "small.safetensors")
    layers = frozen_layers(config_with("flux", toys, tmp_path / "small.safetensors", kind))
    assert all(isinstance(layer, Fp8Linear) for layer in layers.values())
    for name, (codes, scale) in taken(model, layers).items():
        assert torch.equal(codes, file[name].view(torch.uint8)), name
        told = file.get(f"{name.removesuffix('weight')}weight_scale", torch.ones(()))
        assert torch.equal(scale, told.reshape(-1).expand(len(scale))), name


def test_e5m2_is_coded_anew(toys: Toys, tmp_path: Path) -> None:
    _, tensors = originals_of("wan", toys)
    name = "blocks.0.ffn.0.weight"
    small = tensors[name].to(torch.float8_e5m2)
    save_file(tensors | {name: small}, tmp_path / "e5m2.safetensors")
    layer = frozen_layers(config_with("wan", toys, tmp_path / "e5m2.safetensors", "fp8"))["blocks.0.ffn.net.0.proj"]
    # Two bits behind the first are exact in three, unless scaled out of range.
    torch.testing.assert_close(layer.weight, small.float(), rtol=0, atol=small.float().abs().max().item() * 2.0**-16)


def test_a_lora_merged_into_an_fp8_weight_is_not_lost_in_its_rounding(toys: Toys, tmp_path: Path) -> None:
    _, tensors = originals_of("wan", toys)
    name = "blocks.0.ffn.0.weight"
    file = tensors | {name: torch.full_like(tensors[name], 16).to(FP8)}
    save_file(file, tmp_path / "bare.safetensors")
    rows, columns = file[name].shape
    lora = {"lora_A": torch.ones(1, columns), "lora_B": torch.full((rows, 1), 0.25)}  # codes near 16 are 2 apart
    save_file({f"transformer.blocks.0.ffn.net.0.proj.{k}.weight": t for k, t in lora.items()}, tmp_path / "lora.safetensors")
    config = config_with("wan", toys, tmp_path / "bare.safetensors", "fp8")
    merged = config.model.model_copy(update={"merge": [MergeConfig(path=tmp_path / "lora.safetensors")]})
    source = make_model(merged, config.objective).weights()
    assert not source.has_codes("blocks.0.ffn.net.0.proj.weight")
    assert torch.equal(source.read("blocks.0.ffn.net.0.proj.weight", torch.float32), torch.full((rows, columns), 16.25))


@pytest.mark.parametrize(("shape", "told"), [((64, 2), r"is \(64, 2\)"), ((3,), r"is \(3,\)")])
def test_scales_of_another_form_are_refused(toys: Toys, tmp_path: Path, shape: tuple[int, ...], told: str) -> None:
    _, tensors = originals_of("wan", toys)
    name = "blocks.0.ffn.0.weight"
    file: dict[str, Any] = tensors | {name: tensors[name].to(FP8), "blocks.0.ffn.0.scale_weight": torch.ones(shape)}
    save_file(file, tmp_path / "blocks.safetensors")
    with pytest.raises(CheckpointError, match=rf"ffn\.0\.scale_weight {told}|ffn\.0\.scale_weight: {told}"):
        frozen_layers(config_with("wan", toys, tmp_path / "blocks.safetensors", "fp8"))
