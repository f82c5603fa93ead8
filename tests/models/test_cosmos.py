"""Cosmos' latents and captions are what its pipeline works on, and NVIDIA's own names of its VAE are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCosmos
from safetensors.torch import save_file
from torch import Tensor

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.errors import CheckpointError
from diffpipe.models import make_model
from diffpipe.models.base import DiffusionModel
from diffpipe.models.blueprint import Component
from diffpipe.models.encoders import load_component
from tests.families import CAPTIONS, encoded, encoders_of, microbatch

Toys = Callable[[str], Path]


def cosmos(folder: Path) -> DiffusionModel:
    return make_model(ModelConfig(family="cosmos", path=str(folder), dtype="float32"), ObjectiveConfig())


def test_the_pipelines_own_formula_gives_back_what_the_vae_made(toys: Toys) -> None:
    model = cosmos(toys("cosmos"))
    encoders = encoders_of(model)
    vae, pixels = encoders.vae, torch.rand(2, 3, 17, 32, 48) * 2 - 1
    with torch.no_grad():
        made = vae.encode(pixels).latent_dist.mode()
        latents = model.encode_media(encoders, pixels)["latents"]
    # CosmosTextToWorldPipeline.__call__, before it decodes.
    mean, std = (torch.tensor(s).view(1, 4, -1, 1, 1)[:, :, :3] for s in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(latents * std / encoders.pipeline.scheduler.config.sigma_data + mean, made)
    assert not torch.equal(mean[:, :, 0], mean[:, :, 1])


def test_captions_are_zero_beyond_their_end(toys: Toys) -> None:
    model = cosmos(toys("cosmos"))
    encoders = encoders_of(model)
    text = model.encode_text(encoders, CAPTIONS)["text"]
    lengths = [len(encoders.pipeline.tokenizer(c).input_ids) for c in CAPTIONS]
    assert [int(row.any(1).sum()) for row in text] == lengths
    assert min(lengths) < text.shape[1]


@pytest.mark.parametrize(("frames", "told"), [(10, r"10 frames: Cosmos takes 8 k \+ 1"), (129, "129 frames: .* the first 121 only")])
def test_clips_that_the_vae_cannot_take_are_refused(toys: Toys, frames: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        encoded(cosmos(toys("cosmos")), rows=1, columns=1, frames=frames, count=1)


def test_the_last_channel_says_that_nothing_is_padded(toys: Toys) -> None:
    inputs, targets = microbatch(cosmos(toys("cosmos")), frames=9)
    channels = targets[0][0].shape[1]
    assert inputs["hidden_states"].shape[1] == channels + 1
    assert not inputs["hidden_states"][:, channels].any()


def test_a_video_to_world_model_is_refused(toys: Toys, tmp_path: Path) -> None:
    for part in toys("cosmos").rglob("*.json"):
        place = tmp_path / part.relative_to(toys("cosmos"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(part.read_bytes())
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 5}))
    with pytest.raises(CheckpointError, match="takes 5 channels: a video2world model"):
        cosmos(tmp_path).load_denoiser()


# -- NVIDIA's file of the VAE ----------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 16, 32, 32),
    "decode_block_out_channels": (16, 32, 32, 32),
    "num_layers": 2,
    "latents_mean": [0.0] * 64,
    "latents_std": [1.0] * 64,
}


def nvidia(name: str) -> str:
    """The name in cosmos1/models/tokenizer/modules/layers3d.py of a tensor of diffusers' class."""
    for theirs, own in (
        (r"(?<=\.)(weight|bias)$", r"conv3d.\1"),
        (r"norm(\w*)\.norm\.conv3d", r"norm\1.norm"),
        (r"conv_s\.", "0."),
        (r"conv_t\.", "1."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1.0"),
        (r"mid_block\.temp_attentions\.0", "mid.attn_1.1"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
        (r"down_blocks\.", "down."),
        # The innermost level is the first of diffusers' and the last of NVIDIA's.
        (r"up_blocks\.(\d)", lambda m: f"up.{2 - int(m[1])}"),
        (r"resnets\.", "block."),
        (r"samplers\.0", "sample"),
    ):
        name = re.sub(theirs, own, name)
    return name


@torch.no_grad()
def test_comfyuis_vae_gives_the_latents_and_pictures_of_the_module_it_was_written_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module: Any = AutoencoderKLCosmos(**TINY).eval()
    weights = {nvidia(n): t.contiguous() for n, t in module.state_dict().items()}
    # Some that are known of the released file, and what else it holds.
    assert {
        "encoder.conv_in.0.conv3d.weight",
        "encoder.down.0.block.0.nin_shortcut.conv3d.bias",
        "encoder.down.0.downsample.conv3.conv3d.weight",
        "encoder.mid.attn_1.1.proj_out.conv3d.weight",
        "decoder.up.0.block.2.norm1.norm.weight",
        "decoder.up.1.upsample.conv2.conv3d.weight",
        "quant_conv.conv3d.weight",
    } <= set(weights)
    other = {
        f"{part}.{n}": torch.ones(2)
        for part in ("encoder.patcher3d", "decoder.unpatcher3d")
        for n in ("wavelets", "_arange", "patch_size_buffer")
    }
    statistics: dict[str, Tensor] = {"latent_mean": torch.zeros(64), "latent_std": torch.ones(64)}
    save_file(weights | other | statistics, tmp_path / "cosmos_cv8x8x8_1.0.safetensors")
    component = Component("vae", "diffusers", "AutoencoderKLCosmos", TINY, file=tmp_path / "cosmos_cv8x8x8_1.0.safetensors")
    loaded = load_component(component, torch.float32, {"vae": component})
    pixels = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    one, two = (m.encode(pixels).latent_dist.mode() for m in (module, loaded))
    assert torch.equal(one, two)
    assert torch.equal(module.decode(one).sample, loaded.decode(two).sample)
