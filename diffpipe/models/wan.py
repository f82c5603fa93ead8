"""Wan2.1 text to video, 1.3B and 14B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpipe.errors import CheckpointError
from diffpipe.flow import Key, mix, noise
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.encoders import Encoders
from diffpipe.models.names import Originals, Shapes, linear


def original_shapes() -> Shapes:
    """Alibaba's names for Wan2.1 text to video."""
    w, ffn = 1536, 8960
    shapes: Shapes = {"patch_embedding.weight": (w, 16, 1, 2, 2), "patch_embedding.bias": (w,)}
    for name, rows, columns in (
        ("text_embedding.0", w, 4096),
        ("text_embedding.2", w, w),
        ("time_embedding.0", w, 256),
        ("time_embedding.2", w, w),
        ("time_projection.1", 6 * w, w),
        ("head.head", 64, w),
    ):
        shapes |= linear(name, rows, columns)
    block = "blocks.0"
    shapes |= {"head.modulation": (1, 2, w), f"{block}.modulation": (1, 6, w)}
    for attention in ("self_attn", "cross_attn"):
        for name in "qkvo":
            shapes |= linear(f"{block}.{attention}.{name}", w, w)
        shapes |= {f"{block}.{attention}.norm_{n}.weight": (w,) for n in "qk"}
    shapes |= {f"{block}.norm3.{n}": (w,) for n in ("weight", "bias")}
    return shapes | linear(f"{block}.ffn.0", ffn, w) | linear(f"{block}.ffn.2", w, ffn)


class Wan(DiffusionModel):
    name = "wan"
    title = "Wan2.1 t2v 1.3B, 14B"
    spec = StageSpec(("blocks.*",), carry=("condition_embedder",), post=("proj_out", "scale_shift_table"))
    geometry = Geometry(spatial=8, temporal=4, fps=16)
    denoiser = "WanTransformer3DModel"
    pipeline = "WanPipeline"
    originals = Originals(denoiser, original_shapes)
    guided = "classifier-free"

    def other_family(self, config: Mapping[str, Any]) -> str | None:
        return "wan-i2v" if config.get("image_dim") else None

    def class_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["in_channels"] != config["out_channels"] and not config.get("image_dim"):
            raise CheckpointError(
                f"takes {config['in_channels']} channels and no image tokens, as Wan2.2's image to video model does",
                where=self.blueprint[self.component].origin,
                expected=self.title,
            )
        return dict(config)

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C f h w, the mode of the posterior, each channel to mean 0 and deviation 1."""
        frames = pixels.shape[2]
        if frames != self.geometry.frames(frames):
            raise ValueError(f"{frames} frames: Wan's VAE would drop the last {frames - self.geometry.frames(frames)} of them")
        vae = encoders.vae
        mode = vae.encode(pixels.to(encoders.device, vae.dtype)).latent_dist.mode()
        mean, std = statistics(vae, mode.device)
        return {"latents": ((mode - mean) / std).float().cpu()}

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = statistics(vae, latents.device)
        return latents * std + mean

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """``text`` L D from UMT5, zero beyond the caption, at most 512 tokens."""
        length = min(512, encoders.pipeline.tokenizer.model_max_length)
        text, _ = encoders.pipeline.encode_prompt(
            prompt=list(captions), do_classifier_free_guidance=False, device=encoders.device, max_sequence_length=length
        )
        return {"text": text.cpu()}

    def blank_text(self) -> dict[str, Tensor]:
        return {"text": torch.zeros(self.text_length(512), self.denoiser_config["text_dim"])}

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels = shapes["patch_embedding.weight"][:2]
        head = int(self.blueprint[self.component].config["attention_head_dim"])
        return {
            "in_channels": channels,
            "num_layers": layers(shapes, "blocks."),
            "num_attention_heads": width // head,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "image_dim": shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else None,
            "added_kv_proj_dim": width if "img_emb.proj.1.weight" in shapes else None,
        }

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"].float()
        t = self.times(clean, keys)
        e = noise(keys, clean.shape[1:])
        inputs = {"hidden_states": mix(clean, e, t), "timestep": 1000 * t, "encoder_hidden_states": batch["text"].float()}
        return inputs, [(e - clean, None)]

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": text["text"], "negative_prompt_embeds": negative and negative["text"]}


def statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the VAE's latents, 1 C 1 1 1."""
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std
