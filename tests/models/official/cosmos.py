"""Cosmos Predict1: EDM's weighted error of the denoised latents, as NVIDIA trains it, with the scales of EDMEulerScheduler.

``concat_padding_mask`` is off in the module, whose ``forward`` would resize the mask with torchvision, so the mask of zeros that
CosmosTextToWorldPipeline gives is appended here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor, nn


def loss(module: nn.Module, folder: Path, batch: dict[str, Tensor], noise: Tensor, t: Tensor) -> Tensor:
    clean = batch["latents"]
    scheduler = EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler")
    data = scheduler.config["sigma_data"]
    sigma = (t / (1 - t)).view(-1, 1, 1, 1, 1)
    noisy = clean + sigma * noise
    scaled = scheduler.precondition_inputs(noisy, sigma)
    out = module(
        hidden_states=torch.cat([scaled, torch.zeros_like(scaled[:, :1])], 1),
        timestep=scheduler.precondition_noise(sigma.flatten()),
        encoder_hidden_states=batch["text"],
        fps=24,
        return_dict=False,
    )[0]
    denoised = scheduler.precondition_outputs(noisy, out, sigma)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    return torch.mean(weight * (denoised - clean) ** 2)


FIRST = r"blocks\.block0\."
COMFYUI = [
    *(f"blocks.block0.blocks.{i}.adaLN_modulation.{n}" for i in range(3) for n in (1, 2)),
    *(f"blocks.block0.blocks.{i}.block.attn.{name}" for i in range(2) for name in ("to_q.0", "to_k.0", "to_v.0", "to_out.0")),
    *(f"blocks.block0.blocks.2.block.layer{n}" for n in (1, 2)),
]
