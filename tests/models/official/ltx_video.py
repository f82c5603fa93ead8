"""LTX-Video: rectified flow on packed latents, timesteps in thousandths, as Lightricks' LTX-Video-Trainer and LTXPipeline have it."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        folder, subfolder="scheduler", use_dynamic_shifting=False, shift=1.0, shift_terminal=None
    )
    scheduler.timesteps, scheduler.sigmas = 1000 * t, t
    noisy = torch.cat([scheduler.scale_noise(clean[i : i + 1], 1000 * t[i : i + 1], noise[i : i + 1]) for i in range(len(clean))])
    frames, height, width = clean.shape[2:]
    out = module(
        hidden_states=LTXPipeline._pack_latents(noisy),
        encoder_hidden_states=batch["text"],
        timestep=1000 * t,
        encoder_attention_mask=batch["attended"],
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(
            vae.temporal_compression_ratio / 25,
            vae.spatial_compression_ratio,
            vae.spatial_compression_ratio,
        ),
        return_dict=False,
    )[0]
    predicted = LTXPipeline._unpack_latents(out, frames, height, width)
    return torch.nn.functional.mse_loss(predicted.float(), (noise - clean).float())


COMFYUI = [
    *(f"transformer_blocks.0.{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
]
