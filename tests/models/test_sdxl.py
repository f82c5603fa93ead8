"""Stable Diffusion XL's captions, sizes, objective and trained text encoders are those of its pipeline and its papers."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig

from diffpipe.config.schema import AdapterConfig, ModelConfig, ObjectiveConfig
from diffpipe.data.dataset import stack
from diffpipe.errors import CheckpointError, ConfigError
from diffpipe.flow import Key, noise, timesteps
from diffpipe.models import make_model
from diffpipe.models.adapter_files import name_adapter, read_adapter
from diffpipe.models.adapters import adapter_tensors, attach, resolve_targets
from diffpipe.models.base import DiffusionModel
from diffpipe.models.blueprint import shipped
from diffpipe.models.encoders import load_component
from diffpipe.models.ldm import open_clip_originals, vae_originals
from diffpipe.models.names import original_names, to_original
from diffpipe.models.sdxl import SDXL, chunked
from diffpipe.pipeline.stage import sum_errors
from diffpipe.takeaway import export_file
from tests.families import drawn, encoded, encoders_of, with_weights

Toys = Callable[[str], Path]
SHORT = ["a red circle!", "", "a green triangle moving left on a white background"]
LONG = "abcde " * 37  # the toy's tokenizers know letters only: 75 tokens are 15 words, and this is three chunks


def model_of(toys: Toys, objective: dict[str, Any] | None = None, **given: Any) -> DiffusionModel:
    config = ModelConfig(family="sdxl", path=str(toys("sdxl")), dtype="float32", **given)
    return make_model(config, ObjectiveConfig(**(objective or {})))


def rows(model: DiffusionModel, captions: list[str]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        made = model.encode_text(encoders_of(model), captions)
    return [{name: tensors[i] for name, tensors in made.items()} for i in range(len(captions))]


def pipeline_embeddings(toys: Toys, captions: list[str]) -> tuple[Tensor, Tensor]:
    pipeline = StableDiffusionXLPipeline.from_pretrained(toys("sdxl"))
    with torch.no_grad():
        text, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return text, pooled


def test_captions_of_one_chunk_are_what_the_pipeline_makes_of_them(toys: Toys) -> None:
    model = model_of(toys)
    text, pooled = pipeline_embeddings(toys, SHORT)
    batch = stack(model.align(rows(model, SHORT)))
    assert batch["text"].shape == (3, 1, 77, 56)
    assert torch.equal(batch["text"].flatten(1, 2), text)
    assert torch.equal(batch["pooled"], pooled)


def test_a_long_caption_is_chunks_of_75_tokens_and_the_pooled_state_of_the_first(toys: Toys) -> None:
    (row,) = rows(model_of(toys), [LONG])
    text, pooled = pipeline_embeddings(toys, ["abcde " * 15, "abcde " * 15, "abcde " * 7, ""])
    torch.testing.assert_close(row["text"], text, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(row["pooled"], pooled[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_shorter_captions_of_a_step_go_on_with_the_empty_caption(toys: Toys, trained: bool) -> None:
    model = model_of(toys, train_text_encoders=trained)
    name = "tokens" if trained else "text"
    short, empty, long, twice = (row[name] for row in rows(model, ["a square", "", LONG, "abcde " * 16]))
    assert [len(t) for t in (short, empty, long, twice)] == [1, 1, 4, 3]
    batch = stack(model.align(rows(model, ["a square", LONG, "abcde " * 16])))[name]
    torch.testing.assert_close(batch, torch.stack([torch.cat([short, empty, empty]), long[:3], torch.cat([twice[:2], empty])]))
    assert stack(model.align(rows(model, ["a square", ""])))[name].shape[:2] == (2, 1)


def test_each_released_tokenizer_keeps_its_own_tokens_and_padding() -> None:
    components = shipped("sdxl")
    tokenizers = [load_component(components[name], torch.float32, components) for name in ("tokenizer", "tokenizer_2")]
    first, second = chunked("a cat", tokenizers)[0].tolist()
    assert first == [49406, 320, 2368, *[49407] * 74]
    assert second == [49406, 320, 2368, 49407, *[0] * 73]
    # "!!!" is one token, or three of what the second tokenizer also pads with; its caption is longer by a chunk.
    chunks = chunked("cat!!! " * 30, tokenizers)
    assert chunks.shape == (3, 2, 77)
    assert chunks[0, 0].tolist() == [49406, *[2368, 995] * 30, *[49407] * 16]
    assert chunks[1, 0].tolist() == [49406, *[49407] * 76]
    assert chunks[:2, 1].flatten().tolist().count(2368) == 30
    assert chunks[2, 1].tolist() == [49406, 49407, *[0] * 75]


def test_sizes_and_crop_have_the_order_of_the_pipeline(toys: Toys) -> None:
    model = model_of(toys)
    inputs, _ = model.prepare(encoded(model), [Key(0, 0, i, 0) for i in range(2)])
    framing = encoded(model)["framing"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(toys("sdxl"))
    for ids, given in zip(inputs["time_ids"], framing.tolist(), strict=True):
        height, width, top, left, target_height, target_width = given
        assert height != width != top != left
        expected = pipeline._get_add_time_ids((height, width), (top, left), (target_height, target_width), torch.float32, 32)
        assert torch.equal(ids, expected[0])


@pytest.mark.parametrize("zero", [None, True, False])
@pytest.mark.parametrize("prediction", [None, "epsilon", "v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_targets_and_weights_are_those_of_diffusers_scheduler(
    toys: Toys, prediction: str | None, zero: bool | None, gamma: float | None
) -> None:
    model = model_of(toys, {"prediction": prediction, "zero_terminal_snr": zero, "min_snr": gamma})
    batch, keys = encoded(model), [Key(0, 0, i, 0) for i in range(2)]
    inputs, [(target, weight)] = model.prepare(batch, keys)
    clean, e = batch["latents"], noise(keys, batch["latents"].shape[1:])
    v = prediction == "v"
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=v if zero is None else zero
    )
    step = inputs["timestep"]
    assert step.tolist() == [int(1000 * t) for t in timesteps(keys, ObjectiveConfig(timesteps="uniform"), 1)]
    torch.testing.assert_close(inputs["sample"], scheduler.add_noise(clean, e, step))
    torch.testing.assert_close(target, scheduler.get_velocity(clean, e, step) if v else e)
    if gamma is None:
        assert weight is None
        return
    snr = scheduler.alphas_cumprod[step] / (1 - scheduler.alphas_cumprod[step])
    torch.testing.assert_close(weight.flatten(), snr.clamp(max=gamma) / (snr + 1 if v else snr))


def test_a_weight_without_bound_is_refused(toys: Toys) -> None:
    with pytest.raises(ConfigError, match=r"objective\.debiased"):
        model_of(toys, {"debiased": True, "zero_terminal_snr": True})
    model_of(toys, {"debiased": True, "prediction": "v"})
    model_of(toys, {"debiased": True})


# -- the released checkpoint ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> dict[str, dict[str, Tensor]]:
    """The weights of every network of the released pipeline, on meta."""
    kinds = {n: c for n, c in shipped("sdxl").items() if n in ("unet", "vae", "text_encoder", "text_encoder_2")}
    with torch.device("meta"):
        unet, vae = (getattr(diffusers, kinds[n].kind).from_config(kinds[n].config) for n in ("unet", "vae"))
        encoders = [getattr(transformers, kinds[n].kind)(CLIPTextConfig(**kinds[n].config)) for n in ("text_encoder", "text_encoder_2")]
    return {name: module.state_dict() for name, module in zip(kinds, (unet, vae, *encoders), strict=True)}


def test_the_released_unet_has_the_size_that_its_file_tells(released: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    (tmp_path / "unet.safetensors").touch()
    model = make_model(ModelConfig(family="sdxl", files={"unet": tmp_path / "unet.safetensors"}), ObjectiveConfig())
    names = original_names(SDXL.originals, released["unet"])
    shapes = {original: tuple(released["unet"][pieces[0].name].shape) for original, pieces in names.items()}
    told = model.file_config(shapes)
    assert told.keys() >= {"block_out_channels", "transformer_layers_per_block", "attention_head_dim", "cross_attention_dim"}
    assert told == {name: shipped("sdxl")["unet"].config[name] for name in told}


def test_the_released_vae_and_second_encoder_have_original_names_that_diffusers_reads(released: dict[str, dict[str, Tensor]]) -> None:
    vae, encoder = vae_originals(released["vae"]), open_clip_originals(released["text_encoder_2"])
    assert (len(vae), len(encoder), len(released["text_encoder"])) == (248, 389, 196)
    assert vae["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert encoder["transformer.resblocks.31.attn.in_proj_weight"].shape == (3 * 1280, 1280)
    back = convert_ldm_vae_checkpoint(dict(vae), shipped("sdxl")["vae"].config)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in released["vae"].items()}
    again = convert_open_clip_checkpoint(None, dict(encoder), prefix="")
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in released["text_encoder_2"].items()}


def test_one_file_is_every_component_and_tells_the_unets_size(tmp_path: Path) -> None:
    size = {
        "block_out_channels": [64, 128, 128],
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 32,
        "projection_class_embeddings_input_dim": 6 * 256 + 16,
    }
    weights = diffusers.UNet2DConditionModel.from_config(shipped("sdxl")["unet"].config | size).state_dict()
    named = {f"model.diffusion_model.{n}": t for n, t in to_original(weights, original_names(SDXL.originals, weights)).items()}
    file = tmp_path / "sd_xl.safetensors"
    save_file({**named, "first_stage_model.quant_conv.bias": torch.zeros(8), "denoiser.sigmas": torch.zeros(1000)}, file)
    model = make_model(ModelConfig(family="sdxl", path=str(file)), ObjectiveConfig())
    assert {name: component.file for name, component in model.blueprint.items()} == dict.fromkeys(shipped("sdxl"), file)
    assert size.items() <= model.denoiser_config.items()
    read = model.weights()
    assert read.names() == {f"unet.{n}" for n in weights}
    assert all(torch.equal(read.read(f"unet.{n}"), t) for n, t in weights.items())


# -- trained text encoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"addition_embed_type": None}, "older Stable Diffusion"),
        ({"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 72, "addition_time_embed_dim": 8}, "refiner"),
    ],
)
def test_another_stable_diffusion_is_told_before_anything_is_read(toys: Toys, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    folder = shutil.copytree(toys("sdxl"), tmp_path / "other")
    config = folder / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    model = make_model(ModelConfig(family="sdxl", path=str(folder)), ObjectiveConfig())
    with pytest.raises(CheckpointError, match=told):
        model.load_denoiser()


def test_trained_encoders_give_the_unet_what_frozen_ones_have_cached(toys: Toys) -> None:
    captions = ["a square", LONG]
    outputs = []
    for trained in (False, True):
        model = model_of(toys, train_text_encoders=trained)
        batch = stack(model.align(rows(model, captions))) | {k: encoded(model)[k] for k in ("latents", "framing")}
        inputs, _ = model.prepare(batch, [Key(0, 0, i, 0) for i in range(2)])
        with torch.no_grad():
            outputs.append(with_weights(model.load_denoiser(), model)(**inputs, return_dict=False)[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_every_trained_parameter_has_a_gradient(toys: Toys) -> None:
    model = model_of(toys, train_text_encoders=True)
    module = with_weights(model.load_denoiser().requires_grad_(True), model)
    inputs, targets = model.prepare(encoded(model), [Key(0, 0, i, 0) for i in range(2)])
    sum_errors(module(**inputs, return_dict=False), targets).backward()
    assert {n for n, p in module.named_parameters() if p.grad is None} == set()
    names = {n.split(".")[0] for n, _ in module.named_parameters()}
    assert names == {"unet", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya", "plain", "kohya of diffusers' UNet"])
def test_adapters_of_text_encoders_read_back_whatever_they_are_called(toys: Toys, tmp_path: Path, form: str) -> None:
    model = model_of(toys, train_text_encoders=True)
    module = model.load_denoiser()
    config = AdapterConfig(rank=2)
    attach(module, resolve_targets(model, module, config), config, torch.float32)
    tensors = {n: drawn(n, t.shape) for n, t in adapter_tensors(module).items()}
    assert {n.split(".")[0] for n in tensors} == {"unet", "text_encoder", "text_encoder_2"}
    named = name_adapter(tensors, model, "kohya" if form.startswith("kohya") else form) if form != "plain" else tensors
    if form.startswith("kohya of"):
        named = {n: t for n, t in named.items() if not n.startswith("lora_unet_")}
        for name, tensor in tensors.items():
            layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
            if layer.startswith("unet."):
                word = {"A": "down", "B": "up"}[side]
                named[f"lora_{layer.replace('.', '_')}.lora_{word}.weight"] = tensor
    save_file(named, tmp_path / "adapter.safetensors")
    back = read_adapter(tmp_path / "adapter.safetensors", model)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) for n, t in tensors.items())


def test_a_lora_of_text_encoders_converts_without_what_sdxl_makes_no_use_of(toys: Toys, tmp_path: Path) -> None:
    layers = ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_1_mlp_fc1")
    file = tmp_path / "kohya.safetensors"
    save_file({f"{n}.lora_{side}.weight": torch.ones(2, 2) for n in layers for side in ("down", "up")}, file)
    frozen = model_of(toys)
    [path] = export_file(file, formats=["diffusers"], family="sdxl", base=str(frozen.config.path))
    assert load_file(path).keys() == {f"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{side}.weight" for side in "AB"}
    with pytest.raises(CheckpointError, match=r"lora_te1_\S+ is a layer of a text encoder, which stays as it is[\s\S]*train_text_encoders"):
        read_adapter(file, frozen)


def test_a_cache_of_tokens_is_another_than_one_of_embeddings_and_keeps_the_pictures(toys: Toys) -> None:
    frozen, trained = model_of(toys), model_of(toys, train_text_encoders=True)
    assert frozen.identity("text") != trained.identity("text")
    assert frozen.identity("media") == trained.identity("media")


def test_a_model_crosses_to_a_loaders_worker(toys: Toys) -> None:
    model = model_of(toys, train_text_encoders=True)
    spec = model.spec  # kept in the model from now on
    again = pickle.loads(pickle.dumps(model)).spec
    assert [again.live(i) for i in range(1, 32)] == [spec.live(i) for i in range(1, 32)]
