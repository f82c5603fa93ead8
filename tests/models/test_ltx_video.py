"""Every version of LTX-Video's VAE is read from Lightricks' files, and time is counted as the version's pipeline does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXConditionPipeline
from safetensors.torch import save_file

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.models import make_model
from diffpipe.models.blueprint import Component, shipped
from diffpipe.models.converters import to_library_names
from diffpipe.models.encoders import load_component
from diffpipe.models.ltx_video import LTXVideo, vae_config
from diffpipe.models.names import to_original
from diffpipe.models.weights import lazily, realise
from tests.families import encoded, encoders_of

Shapes = dict[str, tuple[int, ...]]
# What Lightricks' configs say of each version (as in ComfyUI's guess_config): kind of block, layers or factor of the channels,
# and for the decoder whether noise is added in its layers.
OLD_ENCODER = [("res", 4), ("all", 1), ("widen", 2), ("res", 3), ("all", 1), ("widen", 2), ("res", 3), ("all", 1), ("res", 3), ("res", 4)]
NEW_ENCODER = [("res", 4), ("space", 2), ("res", 6), ("time", 2), ("res", 6), ("both", 2), ("res", 2), ("both", 2), ("res", 2)]
TIMED_091 = [("res", 8, 0), ("up", 2), ("res", 7, 1), ("up", 2), ("res", 6, 1), ("up", 2), ("res", 5, 1)]
TIMED_095 = [("res", 5, 0), ("up", 2), ("res", 5, 0), ("up", 2), ("res", 5, 0), ("up", 2), ("res", 5, 0)]
OLD_DECODER = [
    *[("res", n, 0) for n in (4, 3)],
    ("up", 1),
    ("res", 3, 0),
    ("narrow", 2),
    ("up", 1),
    ("res", 3, 0),
    ("narrow", 2),
    ("up", 1),
]
VERSIONS: dict[str, tuple[list[Any], list[Any], bool]] = {
    "0.9.0": (OLD_ENCODER, [*OLD_DECODER, ("res", 4, 0)], False),
    "0.9.1": (OLD_ENCODER, TIMED_091, True),
    "0.9.5": (NEW_ENCODER, TIMED_095, True),
}


def conv(name: str, rows: int, columns: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (rows, columns, size, size, size), f"{name}.bias": (rows,)}


def resnet(name: str, into: int, out: int, timed: bool, noise: bool) -> Shapes:
    shapes = conv(f"{name}.conv1.conv", out, into) | conv(f"{name}.conv2.conv", out, out)
    if into != out:
        shapes |= conv(f"{name}.conv_shortcut", out, into, 1) | {f"{name}.norm3.norm.{leaf}": (into,) for leaf in ("weight", "bias")}
    shapes |= {f"{name}.scale_shift_table": (4, into)} if timed else {}
    return shapes | ({f"{name}.per_channel_scale{i}": (into, 1, 1) for i in (1, 2)} if noise else {})


def embedder(name: str, rows: int) -> Shapes:
    return {
        f"{name}.timestep_embedder.linear_{i}.{leaf}": shape
        for i, columns in ((1, 256), (2, rows))
        for leaf, shape in (("weight", (rows, columns)), ("bias", (rows,)))
    }


def blocks(prefix: str, width: int, listed: list[Any], timed: bool) -> tuple[Shapes, int]:
    shapes: Shapes = {}
    for i, (kind, number, *noise) in enumerate(listed):
        name = f"{prefix}.{i}"
        if kind == "res":
            for layer in range(number):
                shapes |= resnet(f"{name}.res_blocks.{layer}", width, width, timed, any(noise))
            shapes |= embedder(f"{name}.time_embedder", 4 * width) if timed else {}
        elif kind in ("widen", "narrow"):
            after = width * number if kind == "widen" else width // number
            shapes |= resnet(name, width, after, False, False)
            width = after
        elif kind == "all":
            shapes |= conv(f"{name}.conv", width, width)
        elif kind == "up":
            shapes |= conv(f"{name}.conv.conv", 8 * width // number, width)
            width //= number
        else:
            shapes |= conv(f"{name}.conv.conv", number * width // {"space": 4, "time": 2, "both": 8}[kind], width)
            width *= number
    return shapes, width


def released(version: str) -> Shapes:
    """Names and shapes of the VAE in Lightricks' file of a version."""
    encoder, decoder, timed = VERSIONS[version]
    inner, width = blocks("encoder.down_blocks", 128, encoder, False)
    shapes = conv("encoder.conv_in.conv", 128, 48) | inner | conv("encoder.conv_out.conv", 129, width)
    inner, width = blocks("decoder.up_blocks", 512 if version == "0.9.0" else 1024, decoder, timed)
    first = next(shape[1] for name, shape in inner.items() if name.endswith("conv1.conv.weight"))
    shapes |= conv("decoder.conv_in.conv", first, 128) | inner | conv("decoder.conv_out.conv", 48, width)
    if timed:
        shapes |= embedder("decoder.last_time_embedder", 2 * width) | {"decoder.last_scale_shift_table": (2, width)}
        shapes |= {"decoder.timestep_scale_multiplier": ()}
    statistics = ("channel", "mean-of-means", "mean-of-stds", "mean-of-stds_over_std-of-means", "std-of-means")
    return shapes | {f"per_channel_statistics.{name}": (128,) for name in statistics}


@pytest.mark.parametrize("base", sorted(VERSIONS))
@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_the_config_of_a_released_vae_follows_from_its_file(version: str, base: str) -> None:
    given = vae_config(shipped("ltx-video")["vae"].config, released(base))
    config = vae_config(given, released(version))
    with torch.device("meta"):
        wanted = AutoencoderKLLTXVideo.from_config(config).state_dict()
    component = Component("vae", "diffusers", "AutoencoderKLLTXVideo", config)
    held = {f"vae.{n}": lazily(shape, torch.float32, lambda: torch.zeros(())) for n, shape in released(version).items()}
    held |= {"model.diffusion_model.proj_out.bias": lazily((128,), torch.float32, lambda: torch.zeros(128))}
    found = to_library_names(component, held)
    assert {n: tuple(t.shape) for n, t in found.items()} == {n: tuple(t.shape) for n, t in wanted.items()}
    # diffusers' own names tell the version as well.
    assert vae_config(given, wanted) == config


# -- a file and the VAE it was written from --------------------------------------------------------------------------

# Each version's levels at a few channels; the last width of 0.9.5 is what diffusers tells it by.
TINY: dict[str, dict[str, Any]] = {
    "0.9.0": {"block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (8, 16, 32, 32), "layers_per_block": (1,) * 5},
    "0.9.1": {"block_out_channels": (8, 16, 32, 32), "decoder_block_out_channels": (16, 32, 64), "layers_per_block": (1,) * 5},
    "0.9.5": {
        "block_out_channels": (8, 32, 64, 256, 2048),
        "decoder_block_out_channels": (16, 32, 64),
        "layers_per_block": (1, 1, 1, 1, 0),
    },
}
DOWN = {
    "0.9.5": {f"down_blocks.{b}.downsamplers.0": f"down_blocks.{2 * b + 1}" for b in range(4)}
    | {f"down_blocks.{b}.": f"down_blocks.{2 * b}." for b in range(4)},
    "0.9.0": {
        "down_blocks.0.downsamplers.0": "down_blocks.1",
        "down_blocks.0.conv_out": "down_blocks.2",
        "down_blocks.1.downsamplers.0": "down_blocks.4",
        "down_blocks.1.conv_out": "down_blocks.5",
        "down_blocks.2.downsamplers.0": "down_blocks.7",
        "down_blocks.1.": "down_blocks.3.",
        "down_blocks.2.": "down_blocks.6.",
        "down_blocks.3.": "down_blocks.8.",
        "mid_block": "down_blocks.9",
    },
}
UP = {
    "0.9.1": {"mid_block": "up_blocks.0"}
    | {f"up_blocks.{b}.upsamplers.0": f"up_blocks.{2 * b + 1}" for b in range(3)}
    | {f"up_blocks.{b}.": f"up_blocks.{2 * b + 2}." for b in range(3)}
    | {"decoder.time_embedder": "decoder.last_time_embedder", "decoder.scale_shift_table": "decoder.last_scale_shift_table"},
    "0.9.0": {
        "mid_block": "up_blocks.0",
        "up_blocks.1.upsamplers.0": "up_blocks.2",
        "up_blocks.2.conv_in": "up_blocks.4",
        "up_blocks.2.upsamplers.0": "up_blocks.5",
        "up_blocks.3.conv_in": "up_blocks.7",
        "up_blocks.3.upsamplers.0": "up_blocks.8",
        "up_blocks.0.": "up_blocks.1.",
        "up_blocks.1.": "up_blocks.3.",
        "up_blocks.2.": "up_blocks.6.",
        "up_blocks.3.": "up_blocks.9.",
    },
}
STATISTICS = {"latents_mean": "per_channel_statistics.mean-of-means", "latents_std": "per_channel_statistics.std-of-means"}


def lightricks(name: str, version: str) -> str:
    """The original name of a tensor of diffusers' class."""
    if name in STATISTICS:
        return STATISTICS[name]
    table = (
        DOWN["0.9.5" if version == "0.9.5" else "0.9.0"] if name.startswith("encoder.") else UP["0.9.0" if version == "0.9.0" else "0.9.1"]
    )
    place = next((theirs for theirs in table if theirs in name), None)
    name = name if place is None else name.replace(place, table[place], 1)
    return name.replace("resnets", "res_blocks").replace("conv_shortcut.conv", "conv_shortcut").replace("norm3", "norm3.norm")


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_a_vae_is_read_from_a_file_with_the_transformer(tmp_path: Path, version: str) -> None:
    config = vae_config(shipped("ltx-video")["vae"].config, released(version)) | TINY[version] | {"latent_channels": 4}
    config |= {"decoder_layers_per_block": [1] * len(config["decoder_layers_per_block"])}
    torch.manual_seed(0)
    module: Any = AutoencoderKLLTXVideo.from_config(config).eval()
    module.latents_std.copy_(torch.rand(4) + 0.5)
    weights = {f"vae.{lightricks(n, version)}": t.contiguous() for n, t in module.state_dict().items()}
    unread = {"vae.per_channel_statistics.channel": torch.zeros(4), "model.diffusion_model.patchify_proj.bias": torch.zeros(2)}
    save_file(weights | unread, tmp_path / "ltx.safetensors")
    component = Component("vae", "diffusers", "AutoencoderKLLTXVideo", config, file=tmp_path / "ltx.safetensors")
    loaded = load_component(component, torch.float32, {"vae": component})
    pixels = torch.rand(1, 3, 9, 64, 32) * 2 - 1
    with torch.no_grad():
        one, other = (m.encode(pixels).latent_dist.mode() for m in (module, loaded))
    assert torch.equal(one, other)
    assert torch.equal(loaded.latents_std, module.latents_std)
    assert one.shape == (1, 4, 2, 2, 1)


def test_one_file_holds_the_transformer_and_the_vae(toys: Callable[[str], Path], tmp_path: Path) -> None:
    whole = make_model(ModelConfig(family="ltx-video", path=str(toys("ltx-video")), dtype="float32"), ObjectiveConfig())
    vae, weights = encoders_of(whole).vae.state_dict(), whole.weights()
    held = {f"vae.{lightricks(n, '0.9.0')}": t.clone() for n, t in vae.items()}
    held |= {f"model.diffusion_model.{n}": realise(t).clone() for n, t in to_original(weights.tensors, whole.original_names()).items()}
    file = tmp_path / "ltx-video.safetensors"
    save_file(held, file)
    files = {"transformer": file, "vae": file}
    apart = make_model(whole.config.model_copy(update={"files": files}), ObjectiveConfig())
    assert all(torch.equal(apart.weights().read(n), weights.read(n)) for n in weights.names())
    assert torch.equal(encoded(apart, frames=9)["latents"], encoded(whole, frames=9)["latents"])


# -- positions -------------------------------------------------------------------------------------------------------


def test_time_is_counted_from_the_first_frame_since_0_9_5() -> None:
    model = make_model(ModelConfig(family="ltx-video"), ObjectiveConfig())
    assert isinstance(model, LTXVideo)
    ids = LTXConditionPipeline._prepare_video_ids(batch_size=1, num_frames=3, height=2, width=4)
    expected = LTXConditionPipeline._scale_video_ids(ids).float()
    expected[:, 0] /= 25
    assert expected[0, 0].unique().tolist() == pytest.approx([0, 1 / 25, 9 / 25])
    assert torch.equal(model.positions(3, 2, 4), expected)


def test_the_earlier_versions_count_eight_frames_for_the_first(toys: Callable[[str], Path]) -> None:
    model = make_model(ModelConfig(family="ltx-video", path=str(toys("ltx-video"))), ObjectiveConfig())
    assert isinstance(model, LTXVideo)
    assert model.positions(3, 2, 4)[0, 0].unique().tolist() == pytest.approx([0, 8 / 25, 16 / 25])


def test_frames_that_the_vae_would_drop_are_refused(toys: Callable[[str], Path]) -> None:
    model = make_model(ModelConfig(family="ltx-video", path=str(toys("ltx-video")), dtype="float32"), ObjectiveConfig())
    with pytest.raises(ValueError, match="10 frames"):
        encoded(model, frames=10)
