"""Components of single files give the outputs of the module they were written from, whatever their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from diffpipe.errors import CheckpointError
from diffpipe.models.blueprint import Component
from diffpipe.models.encoders import load_component

# -- CLIP's picture half ---------------------------------------------------------------------------------------------

EYES = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, hidden_act="gelu"
)


def eyes() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(EYES).eval()


def image_encoder(file: Path) -> Any:
    component = Component("image_encoder", "transformers", "CLIPVisionModel", EYES.to_dict(), file=file)
    return load_component(component, torch.float32, {"image_encoder": component})


@torch.no_grad()
def sees_the_same(one: CLIPVisionModel, other: CLIPVisionModel) -> bool:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states = [m(pixel_values=pixels, output_hidden_states=True).hidden_states for m in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def plain(module: CLIPVisionModel) -> dict[str, Tensor]:
    return {n.removeprefix("vision_model."): t for n, t in module.state_dict().items()}


def alibaba(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of wan/modules/clip.py's VisionTransformer."""
    named = {
        "cls_embedding": weights["embeddings.class_embedding"][None, None],
        "pos_embedding": weights["embeddings.position_embedding.weight"][None],
        "patch_embedding.weight": weights["embeddings.patch_embedding.weight"],
        "head": torch.randn(32, 16),
    }
    layers = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for leaf in ("weight", "bias"):
        named |= {f"pre_norm.{leaf}": weights[f"pre_layrnorm.{leaf}"], f"post_norm.{leaf}": weights[f"post_layernorm.{leaf}"]}
        for i in range(3):
            layer = f"encoder.layers.{i}"
            named |= {f"transformer.{i}.{own}.{leaf}": weights[f"{layer}.{theirs}.{leaf}"] for own, theirs in layers.items()}
            named[f"transformer.{i}.attn.to_qkv.{leaf}"] = torch.cat([weights[f"{layer}.self_attn.{p}_proj.{leaf}"] for p in "qkv"])
    return named


def test_the_official_clip_of_wan_is_read_from_its_pth_and_from_the_half_that_kijai_took(tmp_path: Path) -> None:
    module = eyes()
    visual = {f"visual.{n}": t.contiguous() for n, t in alibaba(plain(module)).items()}
    log_scale = torch.tensor(2.6)
    torch.save({**visual, "textual.token_embedding.weight": torch.randn(7, 5), "log_scale": log_scale}, tmp_path / "models_clip.pth")
    save_file({**visual, "log_scale": log_scale}, tmp_path / "kijai.safetensors")
    save_file({n.removeprefix("visual."): t for n, t in visual.items()} | {"log_scale": log_scale}, tmp_path / "bare.safetensors")
    for name in ("models_clip.pth", "kijai.safetensors", "bare.safetensors"):
        assert sees_the_same(image_encoder(tmp_path / name), module), name


def test_comfyuis_clip_vision_is_read_under_the_names_of_the_library(tmp_path: Path) -> None:
    module = eyes()
    weights = {f"vision_model.{n}": t.contiguous() for n, t in plain(module).items()}
    weights |= {"visual_projection.weight": torch.randn(16, 32), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(weights, tmp_path / "clip_vision_h.safetensors")
    assert sees_the_same(image_encoder(tmp_path / "clip_vision_h.safetensors"), module)


@pytest.mark.parametrize(("changed", "told"), [("mlp.0.bias", "lacks .*fc1.bias"), ("extra.weight", "beside those .*extra.weight")])
def test_a_picture_encoder_that_lacks_a_tensor_or_has_another_is_refused(tmp_path: Path, changed: str, told: str) -> None:
    weights = {n: t.contiguous() for n, t in alibaba(plain(eyes())).items()}
    name = f"transformer.1.{changed}"
    weights = {n: t for n, t in weights.items() if n != name} if name in weights else weights | {name: torch.zeros(3)}
    save_file(weights, tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match=rf"clip\.safetensors: .*{told}"):
        image_encoder(tmp_path / "clip.safetensors")
