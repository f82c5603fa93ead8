"""What SDXL exports loads in its real pipeline, text encoders included, and gives the trained model's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from diffpipe.config.schema import Config
from diffpipe.export.run import export_tensors
from diffpipe.models.adapters import adapter_tensors
from tests.export.tiny import MakeConfig, model_of, output_of, trained
from tests.families import CAPTIONS, microbatch

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
