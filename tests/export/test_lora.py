"""An exported LoRA loads in the real pipelines and gives the trained model's output."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffpipe.config.schema import Config, ModelConfig, ObjectiveConfig
from diffpipe.export.files import write_safetensors
from diffpipe.export.run import export_tensors
from diffpipe.models import make_model
from diffpipe.models.adapter_files import name_adapter
from diffpipe.models.adapters import adapter_tensors
from diffpipe.models.flux import Flux
from diffpipe.models.names import lora_to_original, original_names, to_original
from diffpipe.models.weights import Lazy, open_files
from tests.export.tiny import MakeConfig, model_of, output_of, trained

ADAPTER = {"rank": 4, "alpha": 6.0}


def export(config: Config, tensors: dict[str, Tensor], folder: Path, *formats: str) -> list[Path]:
    """As a run of two stages does it, which cut the layers of one original weight apart."""
    names = sorted(tensors)
    files = [write_safetensors(folder / f"stage-{i}.safetensors", {n: tensors[n] for n in names[i::2]}, {}) for i in range(2)]
    return export_tensors(config, model_of(config), open_files(files), folder / "out", formats)


def deltas(tensors: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    layers = {n.rsplit(".lora_", 1)[0] for n in tensors}
    return {f"{n}.weight": scale * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in layers}


LOADED = [
    pytest.param("chroma", "diffusers", id="chroma"),
    pytest.param("flux", "diffusers", id="flux"),
    pytest.param("flux-kontext", "diffusers", id="flux-kontext"),
    pytest.param("hunyuan-video", "diffusers", id="hunyuan-video"),
    pytest.param("ltx-video", "diffusers", id="ltx-video"),
    pytest.param("ltx-video", "comfyui", id="ltx-video-original-names"),
    pytest.param("lumina2", "diffusers", id="lumina2"),
    pytest.param("wan", "diffusers", id="wan"),
    pytest.param("wan", "comfyui", id="wan-original-names"),
    pytest.param("wan-i2v", "diffusers", id="wan-i2v"),
    pytest.param("wan-i2v", "comfyui", id="wan-i2v-original-names"),
]


@pytest.mark.parametrize(("family", "kind"), LOADED)
def test_a_lora_loads_in_the_real_pipeline_and_gives_the_trained_output(
    make_config: MakeConfig, tmp_path: Path, family: str, kind: str
) -> None:
    config = make_config(family, ADAPTER)
    module = trained(config)
    (path,) = export(config, adapter_tensors(module), tmp_path, kind)
    pipeline = getattr(diffusers, model_of(config).pipeline).from_pretrained(config.model.path)
    bare = output_of(pipeline.transformer.eval(), model_of(config))
    pipeline.load_lora_weights(path)
    assert (output_of(pipeline.transformer, model_of(config)) - bare).abs().max() > 0.01
    torch.testing.assert_close(output_of(pipeline.transformer, model_of(config)), output_of(module, model_of(config)), rtol=1e-5, atol=1e-5)


def test_a_lora_under_original_names_changes_each_original_weight_as_the_trained_layers_do(
    make_config: MakeConfig, family: str, tmp_path: Path
) -> None:
    config = make_config(family, ADAPTER)
    tensors = adapter_tensors(trained(config))
    (path,) = export(config, tensors, tmp_path, "comfyui")
    written = {n.removeprefix("diffusion_model."): t for n, t in load_file(path).items()}
    whole = model_of(config).load_denoiser().state_dict()
    want = {n: torch.zeros(p.shape) for n, p in whole.items()} | deltas(tensors, 6 / 4)
    original = to_original(want, model_of(config).original_names())
    changed = {n for n, t in original.items() if t.any()}
    assert changed == set(deltas(written))
    for name, delta in deltas(written).items():
        torch.testing.assert_close(delta, original[name])


def test_a_joined_layer_of_which_only_a_part_is_adapted_leaves_the_rest_as_it_was(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("flux", {**ADAPTER, "targets": [r"^transformer_blocks\.1\.attn\.to_k$"]})
    tensors = adapter_tensors(trained(config))
    (path,) = export(config, tensors, tmp_path, "comfyui")
    written = load_file(path)
    layer = "diffusion_model.double_blocks.1.img_attn.qkv"
    assert set(written) == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}
    query, key, value = written[f"{layer}.lora_B.weight"].chunk(3)
    assert not query.any()
    assert not value.any()
    torch.testing.assert_close(key, tensors["transformer_blocks.1.attn.to_k.lora_B.weight"] * 1.5)


def test_at_released_width_diffusers_reads_a_flux_lora_under_original_names_back() -> None:
    # diffusers reads these names in kohya's spelling only, and at Flux's own width only.
    with torch.device("meta"):
        whole = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, layer in whole.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks." in name:
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    shapes = {n: tuple(t.shape) for n, t in whole.state_dict().items()}
    renamed = lora_to_original(tensors, original_names(Flux.originals, shapes), shapes)
    kohya: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
        kohya[f"lora_unet_{layer.replace('.', '_')}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
    back = FluxPipeline.lora_state_dict(kohya)
    assert {n.removeprefix("transformer.") for n in back} == set(tensors)
    assert all(torch.equal(back[f"transformer.{n}"], t) for n, t in tensors.items())


@pytest.mark.parametrize("family", ["hunyuan-video", "lumina2"])
def test_at_released_width_diffusers_reads_a_lora_under_original_names_back(family: str) -> None:
    model = make_model(ModelConfig(family=family), ObjectiveConfig())
    whole = model.load_denoiser()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name in model.adapter_targets(whole):
        if re.match(r"\w+\.0\.", name):
            layer = whole.get_submodule(name)
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, int(layer.in_features), generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(int(layer.out_features), 2, generator=generator)
    back = getattr(diffusers, model.pipeline).lora_state_dict(name_adapter(tensors, model, "comfyui"))
    back = {n.removeprefix("transformer."): t for n, t in back.items()}
    assert set(back) == set(tensors)
    for name in {n.rpartition(".lora_")[0] for n in tensors}:
        given = torch.randn(tensors[f"{name}.lora_A.weight"].shape[1], generator=generator)
        got, expected = (t[f"{name}.lora_B.weight"] @ (t[f"{name}.lora_A.weight"] @ given) for t in (back, tensors))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_the_header_tells_where_a_lora_comes_from(make_config: MakeConfig, family: str, tmp_path: Path) -> None:
    config = make_config(family, ADAPTER)
    paths = export(config, adapter_tensors(trained(config)), tmp_path, "diffusers", "comfyui")
    for path, kind in zip(paths, ("diffusers", "comfyui"), strict=True):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        assert about["format"] == "pt"
        assert about["diffpipe.format"] == kind
        assert about["diffpipe.base"] == config.model.path
        assert (about["diffpipe.rank"], about["diffpipe.alpha"]) == ("4", "6.0")
        assert about["diffpipe.version"]
        assert about.get("ss_base_model_version", "").startswith("sdxl_") == (family == "sdxl")
        assert len(about["diffpipe.config_hash"]) == 16


def test_a_lora_is_written_in_the_type_asked_for_after_alpha_is_folded_in(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("flux", {"rank": 3, "alpha": 1.0}, {"dtype": "bfloat16"})
    tensors = adapter_tensors(trained(config))
    (path,) = export(config, tensors, tmp_path, "diffusers")
    written = load_file(path)
    name = "transformer_blocks.0.attn.to_q.lora_B.weight"
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    assert torch.equal(written[f"transformer.{name}"], (tensors[name] * (1 / 3)).to(torch.bfloat16))


def test_renaming_reads_nothing() -> None:
    def fail() -> Tensor:
        raise AssertionError("read")

    with torch.device("meta"):
        whole = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).state_dict()
    lazy = {n: Lazy(t, fail) for n, t in whole.items()}
    assert all(isinstance(t, Lazy) for t in to_original(lazy, original_names(Flux.originals, lazy)).values())
