"""What SDXL exports loads in its real pipeline, text encoders included, and gives the trained model's output."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffpipe.config.schema import Config
from diffpipe.errors import CheckpointError
from diffpipe.export.files import write_safetensors
from diffpipe.export.run import check_formats, export_tensors
from diffpipe.models.adapters import adapter_tensors
from diffpipe.models.weights import open_files
from tests.export.tiny import MakeConfig, model_of, output_of, trained
from tests.families import CAPTIONS, encoded, microbatch

ADAPTER = {"rank": 4, "alpha": 6.0}
TRAINED = pytest.mark.parametrize("encoders", [False, True], ids=["frozen", "trained"])


def config_of(make_config: MakeConfig, encoders: bool, adapter: dict[str, Any] | None = None) -> Config:
    config = make_config("sdxl", adapter)
    return config.model_copy(update={"model": config.model.model_copy(update={"train_text_encoders": encoders})})


def pipeline_output(pipeline: Any, config: Config) -> Tensor:
    """The UNet's output for the examples of ``microbatch``, their captions encoded by the pipeline itself."""
    inputs, _ = microbatch(model_of(config))
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(list(CAPTIONS[:2]), do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": inputs["time_ids"]}
        return pipeline.unet(inputs["sample"], inputs["timestep"], text, added_cond_kwargs=added, return_dict=False)[0]


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@TRAINED
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_lora_loads_in_the_pipeline_and_gives_the_trained_output(
    make_config: MakeConfig, tmp_path: Path, kind: str, encoders: bool
) -> None:
    config = config_of(make_config, encoders, ADAPTER)
    module = trained(config)
    (path,) = export_tensors(config, model_of(config), adapter_tensors(module), tmp_path, [kind])
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.model.path)
    expected = output_of(module, model_of(config))
    assert relative(pipeline_output(pipeline, config), expected) > 1e-3
    states = pipeline.encode_prompt(list(CAPTIONS[:2]), do_classifier_free_guidance=False)
    pipeline.load_lora_weights(path)
    assert relative(pipeline_output(pipeline, config), expected) < 1e-5
    for before, after in zip(states[::2], pipeline.encode_prompt(list(CAPTIONS[:2]), do_classifier_free_guidance=False)[::2], strict=True):
        assert torch.equal(before, after) != encoders


def test_adapters_of_text_encoders_have_the_names_that_comfyui_and_kohya_read(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, True, ADAPTER)
    paths = export_tensors(config, model_of(config), adapter_tensors(trained(config)), tmp_path, ["diffusers", "comfyui", "kohya"])
    diffusers, comfyui, kohya = (
        {n.rpartition(".")[0].removesuffix(".lora_A") for n in load_file(p) if "lora_A" in n or "down" in n} for p in paths
    )
    layers = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    # Of the first encoder's two layers SDXL uses one.
    own = {("", "l", 1, 0, n) for n in layers} | {("_2", "g", 2, i, n) for i in (0, 1) for n in layers}
    assert {n for n in diffusers if n.startswith("text_encoder")} == {
        f"text_encoder{a}.text_model.encoder.layers.{i}.{n}" for a, _, _, i, n in own
    }
    assert {n for n in comfyui if n.startswith("text_encoders")} == {
        f"text_encoders.clip_{b}.transformer.text_model.encoder.layers.{i}.{n}" for _, b, _, i, n in own
    }
    assert {n.removesuffix(".lora_down") for n in kohya if n.startswith("lora_te")} == {
        f"lora_te{c}_text_model_encoder_layers_{i}_{n}".replace(".", "_") for _, _, c, i, n in own
    }


def exported(config: Config, folder: Path, kind: str) -> tuple[Any, list[Path]]:
    """The trained module, and what is written of it in two parts as by two stages."""
    module = trained(config)
    names = sorted(module.state_dict())
    files = [write_safetensors(folder / f"stage-{i}.safetensors", {n: module.state_dict()[n] for n in names[i::2]}, {}) for i in range(2)]
    return module, export_tensors(config, model_of(config), open_files(files), folder / "out", [kind])


@TRAINED
def test_folders_make_a_pipeline_that_gives_the_trained_output(make_config: MakeConfig, tmp_path: Path, encoders: bool) -> None:
    config = config_of(make_config, encoders)
    module, paths = exported(config, tmp_path, "diffusers")
    assert [p.name for p in paths] == ["unet", "text_encoder", "text_encoder_2"][: 3 if encoders else 1]
    kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    components = {p.name: kinds[p.name].from_pretrained(p) for p in paths}
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.model.path, **components)
    assert relative(pipeline_output(pipeline, config), output_of(module, model_of(config))) < 1e-6
    base = StableDiffusionXLPipeline.from_pretrained(config.model.path)
    for name in ("text_encoder", "text_encoder_2") if encoders else ():
        held, was = components[name].state_dict(), getattr(base, name).state_dict()
        kept = {n for n in held if torch.equal(held[n], was[n])}
        # What SDXL has no use for is not trained, and comes along as it was.
        assert kept == {n for n in held if re.search(r"layers\.1\.|final_layer_norm", n) and name == "text_encoder"}


@TRAINED
def test_the_whole_checkpoint_loads_in_diffusers_and_gives_the_trained_output(
    make_config: MakeConfig, tmp_path: Path, encoders: bool
) -> None:
    config = config_of(make_config, encoders)
    module, [path] = exported(config, tmp_path, "comfyui")
    pipeline = StableDiffusionXLPipeline.from_single_file(str(path), config=config.model.path, local_files_only=True)
    assert relative(pipeline_output(pipeline, config), output_of(module, model_of(config))) < 1e-5
    base = StableDiffusionXLPipeline.from_pretrained(config.model.path)
    assert all(torch.equal(t, base.vae.state_dict()[n]) for n, t in pipeline.vae.state_dict().items())


@TRAINED
def test_diffpipe_reads_every_component_of_its_own_checkpoint(make_config: MakeConfig, tmp_path: Path, encoders: bool) -> None:
    config = config_of(make_config, encoders)
    module, [path] = exported(config, tmp_path, "comfyui")
    files = dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), path)
    again = config.model_copy(update={"model": config.model.model_copy(update={"files": files})})
    weights = model_of(again).weights()
    assert weights.names() == set(module.state_dict())
    assert all(torch.equal(weights.read(n), t) for n, t in module.state_dict().items())
    # As the encoders of act one they give other text than before only when they were trained.
    base = config_of(make_config, False)
    frozen = again.model.model_copy(update={"train_text_encoders": False})
    expected, got = encoded(model_of(base)), encoded(model_of(base.model_copy(update={"model": frozen})))
    for name, tensor in expected.items():
        same = torch.allclose(got[name], tensor, rtol=1e-5, atol=1e-5)
        assert same != (encoders and name in ("text", "pooled")), name


@pytest.mark.parametrize("lacking", ["vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"])
def test_what_the_whole_checkpoint_lacks_is_told_before_training(make_config: MakeConfig, tmp_path: Path, lacking: str) -> None:
    config = make_config("sdxl", export={"formats": ["comfyui"]})
    check_formats(config, model_of(config))
    copy = shutil.copytree(str(config.model.path), tmp_path / "sdxl")
    (Path(copy) / lacking).unlink()
    poor = config.model_copy(update={"model": config.model.model_copy(update={"path": str(copy)})})
    with pytest.raises(CheckpointError, match=lacking.partition("/")[2]):
        check_formats(poor, model_of(poor))
