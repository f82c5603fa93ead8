"""HunyuanVideo: rectified flow on 5-D latents, timestep and guidance times 1000, text with its mask, as HunyuanVideoPipeline samples."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", shift=1.0)
    scheduler.timesteps, scheduler.sigmas = t * scheduler.config["num_train_timesteps"], t
    noisy = torch.cat(
        [scheduler.scale_noise(clean[i : i + 1], scheduler.timesteps[i : i + 1], noise[i : i + 1]) for i in range(len(clean))]
    )
    out = module(
        hidden_states=noisy,
        timestep=scheduler.timesteps,
        encoder_hidden_states=batch["text"],
        encoder_attention_mask=batch["text_mask"].to(batch["text"].dtype),
        pooled_projections=batch["pooled"],
        guidance=torch.tensor([1.0] * len(clean)) * 1000.0,
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(out.float(), (noise - clean).float())


COMFYUI = [
    *(f"double_blocks.0.{s}_{n}" for s in ("img", "txt") for n in ("mod.linear", "attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")),
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
    "single_blocks.0.modulation.linear",
]
