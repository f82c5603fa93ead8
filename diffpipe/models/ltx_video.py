"""LTX-Video: 2B (0.9.0, 0.9.1, 0.9.5, 0.9.6) and 13B (0.9.7, 0.9.8)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpipe.flow import Key, mix, noise
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.blueprint import Component, shipped
from diffpipe.models.encoders import Encoders, file_shapes
from diffpipe.models.names import Originals, Shapes, linear

# The VAEs before the shipped one, which is that of 0.9.5 and later, as diffusers' scripts/convert_ltx_to_diffusers.py has them.
EARLIER_ENCODER: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["LTXVideoDownBlock3D"] * 4,
    "layers_per_block": [4, 3, 3, 3, 4],
    "spatio_temporal_scaling": [True, True, True, False],
    "downsample_type": ["conv"] * 4,
}
DECODER_091: dict[str, Any] = {"decoder_layers_per_block": [5, 6, 7, 8], "decoder_inject_noise": [True, True, True, False]}
DECODER_090: dict[str, Any] = {
    "decoder_block_out_channels": [128, 256, 512, 512],
    "decoder_layers_per_block": [4, 3, 3, 3, 4],
    "decoder_spatio_temporal_scaling": [True, True, True, False],
    "decoder_inject_noise": [False] * 5,
    "upsample_residual": [False] * 4,
    "upsample_factor": [1] * 4,
    "timestep_conditioning": False,
}


def original_shapes() -> Shapes:
    """Lightricks' names for the 2B model; the 13B one has the same."""
    w = 2048
    shapes = linear("patchify_proj", w, 128) | linear("proj_out", 128, w) | {"scale_shift_table": (2, w)}
    shapes |= linear("adaln_single.emb.timestep_embedder.linear_1", w, 256) | linear("adaln_single.emb.timestep_embedder.linear_2", w, w)
    shapes |= linear("adaln_single.linear", 6 * w, w)
    shapes |= linear("caption_projection.linear_1", w, 4096) | linear("caption_projection.linear_2", w, w)
    block = "transformer_blocks.0"
    for attention in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{block}.{attention}.{name}", w, w)
        shapes |= {f"{block}.{attention}.{n}_norm.weight": (w,) for n in "qk"}
    shapes |= linear(f"{block}.ff.net.0.proj", 4 * w, w) | linear(f"{block}.ff.net.2", w, 4 * w)
    return shapes | {f"{block}.scale_shift_table": (6, w)}


class LTXVideo(DiffusionModel):
    name = "ltx-video"
    title = "LTX-Video 2B, 13B (0.9)"
    spec = StageSpec(("transformer_blocks.*",), carry=("time_embed", "caption_projection"), post=("proj_out", "scale_shift_table"))
    geometry = Geometry(spatial=32, temporal=8, patch=1, fps=25)
    denoiser = "LTXVideoTransformer3DModel"
    pipeline = "LTXPipeline"
    originals = Originals(denoiser, original_shapes)
    guided = "classifier-free"

    def component_config(self, component: Component) -> dict[str, Any]:
        return vae_config(component.config, file_shapes(component)) if component.name == "vae" else component.config

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C f h w, the mode of the posterior, each channel to mean 0 and deviation 1 by the VAE's own statistics."""
        frames = pixels.shape[2]
        if frames != self.geometry.frames(frames):
            raise ValueError(f"{frames} frames: LTX-Video takes 8 k + 1")
        vae = encoders.vae
        mode = vae.encode(pixels.to(encoders.device, vae.dtype)).latent_dist.mode()
        mean, std = statistics(vae, mode)
        return {"latents": ((mode - mean) * vae.config.scaling_factor / std).float().cpu()}

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = statistics(vae, latents)
        return latents * std / vae.config.scaling_factor + mean

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        # The later decoders take out what noise is left at a timestep; cached latents have none.
        at = torch.zeros(len(latents), device=latents.device, dtype=latents.dtype) if vae.config.timestep_conditioning else None
        return vae.decode(latents, at, return_dict=False)[0]

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """``text`` L D from T5 (at most 128 tokens, padded), ``attended`` L: true for the caption's tokens."""
        length = min(128, encoders.pipeline.tokenizer.model_max_length)
        text, attended, *_ = encoders.pipeline.encode_prompt(
            prompt=list(captions), do_classifier_free_guidance=False, device=encoders.device, max_sequence_length=length
        )
        return {"text": text.cpu(), "attended": attended.bool().cpu()}

    def blank_text(self) -> dict[str, Tensor]:
        length = self.text_length(128)
        return {"text": torch.zeros(length, self.denoiser_config["caption_channels"]), "attended": torch.ones(length, dtype=torch.bool)}

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels = shapes["patchify_proj.weight"]
        heads = int(self.blueprint[self.component].config["num_attention_heads"])  # 32 in both sizes
        return {
            "in_channels": channels,
            "out_channels": shapes["proj_out.weight"][0],
            "num_layers": layers(shapes, "transformer_blocks."),
            "attention_head_dim": width // heads,
            "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
            "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        }

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"].float()
        count, _, frames, height, width = clean.shape
        t = self.times(clean, keys)
        e = noise(keys, clean.shape[1:])
        inputs = {
            "hidden_states": pack(mix(clean, e, t)),
            "encoder_hidden_states": batch["text"].float(),
            "encoder_attention_mask": batch["attended"],
            "timestep": 1000 * t,
            "video_coords": self.positions(frames, height, width).expand(count, -1, -1),
        }
        return inputs, [(pack(e - clean), None)]

    def spread(self, mask: Tensor, target: Tensor) -> Tensor:
        return mask.flatten(1).unsqueeze(2).repeat(1, target.shape[1] // mask[0].numel(), 1)  # the same in each latent frame

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        given = {"prompt_embeds": text["text"], "prompt_attention_mask": text["attended"]}
        if negative is not None:
            given |= {"negative_prompt_embeds": negative["text"], "negative_prompt_attention_mask": negative["attended"]}
        return given

    def inputs_of(self, call: dict[str, Any], shown: Mapping[str, Tensor]) -> dict[str, Any]:
        """With positions as in training, which are not the pipeline's from 0.9.5 on."""
        sizes = {name: call.pop(name) for name in ("num_frames", "height", "width", "rope_interpolation_scale")}
        return {**call, "video_coords": self.positions(sizes["num_frames"], sizes["height"], sizes["width"])}

    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return packed.transpose(1, 2).reshape(like.shape)

    def positions(self, frames: int, rows: int, columns: int) -> Tensor:
        """Seconds, pixels down and pixels across of each token, 1 3 (f h w).

        As LTXPipeline and, from 0.9.5 on, LTXConditionPipeline have them. There the first latent frame, which holds one frame, lasts
        as long as a frame (``causal_temporal_positioning`` in Lightricks' own configs), and before it lasted as long as eight.
        """
        step, side = self.geometry.temporal, self.geometry.spatial
        frame = torch.arange(frames, dtype=torch.float32) * step
        if _later(self.blueprint["vae"].config):
            frame = (frame + 1 - step).clamp(min=0)
        assert self.geometry.fps is not None
        down, across = (torch.arange(n, dtype=torch.float32) * side for n in (rows, columns))
        return torch.stack(torch.meshgrid(frame / self.geometry.fps, down, across, indexing="ij")).reshape(1, 3, -1)


def vae_config(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The config of the VAE that a file holds: ``config`` where it is of the same version, else the released one.

    0.9.1 gave the decoder a timestep, and 0.9.5 the encoder another form, which 0.9.6 to 0.9.8 kept.

    Args:
        names: of the file's tensors, original ones or diffusers' own.
    """
    # A layer that only downsampling beside a shortcut has.
    later = not {"encoder.down_blocks.1.conv.conv.weight", "encoder.down_blocks.0.downsamplers.0.conv.conv.weight"}.isdisjoint(names)
    timed = any(n.startswith(("decoder.last_time_embedder.", "decoder.time_embedder.")) for n in names)
    if (later, timed) == (_later(config), bool(config.get("timestep_conditioning"))):
        return config
    released = shipped("ltx-video")["vae"].config
    return released if later else {**released, **EARLIER_ENCODER, **(DECODER_091 if timed else DECODER_090)}


def statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the VAE's latents, 1 C 1 1 1, where and as ``latents`` are."""
    mean, std = (s.view(1, -1, 1, 1, 1).to(latents) for s in (vae.latents_mean, vae.latents_std))
    return mean, std


def pack(latents: Tensor) -> Tensor:
    """B C f h w to B (f h w) C: one token per cell."""
    return latents.flatten(2).transpose(1, 2)


def _later(config: Mapping[str, Any]) -> bool:
    """Whether a VAE is that of 0.9.5 and later."""
    return "LTXVideo095DownBlock3D" in config.get("down_block_types", ())
