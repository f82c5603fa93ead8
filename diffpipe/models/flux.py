"""Flux.1 dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpipe.flow import Key, mix, noise
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.encoders import Encoders
from diffpipe.models.names import Originals, Shapes, linear


def original_shapes() -> Shapes:
    """Black Forest Labs' names for Flux.1 dev; schnell lacks guidance_in."""
    w, head = 3072, 128
    shapes = linear("img_in", w, 64) | linear("txt_in", w, 4096)
    for embed, columns in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= linear(f"{embed}.in_layer", w, columns) | linear(f"{embed}.out_layer", w, w)
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes |= linear(f"{block}_mod.lin", 6 * w, w) | linear(f"{block}_attn.qkv", 3 * w, w) | linear(f"{block}_attn.proj", w, w)
        shapes |= {f"{block}_attn.norm.{n}_norm.scale": (head,) for n in ("query", "key")}
        shapes |= linear(f"{block}_mlp.0", 4 * w, w) | linear(f"{block}_mlp.2", w, 4 * w)
    single = "single_blocks.0"
    shapes |= linear(f"{single}.linear1", 7 * w, w) | linear(f"{single}.linear2", w, 5 * w) | linear(f"{single}.modulation.lin", 3 * w, w)
    shapes |= {f"{single}.norm.{n}_norm.scale": (head,) for n in ("query", "key")}
    return shapes | linear("final_layer.linear", 64, w) | linear("final_layer.adaLN_modulation.1", 2 * w, w)


class Flux(DiffusionModel):
    name = "flux"
    title = "Flux.1 dev, schnell"
    spec = StageSpec(("transformer_blocks.*", "single_transformer_blocks.*"), carry=("time_text_embed",), post=("norm_out", "proj_out"))
    geometry = Geometry(spatial=8)
    denoiser = "FluxTransformer2DModel"
    pipeline = "FluxPipeline"
    originals = Originals(denoiser, original_shapes, {"num_layers": 1, "num_single_layers": 1})
    base_version = "flux1"
    options = frozenset({"model.guidance"})
    guided = "distilled"

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C h w, the mode of the posterior: the same picture always gives the same latents."""
        return {"latents": latents_of(encoders, pixels)}

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """``text`` L D from T5 (at most 512 tokens, padded), ``pooled`` D from CLIP."""
        length = min(512, encoders.pipeline.tokenizer_2.model_max_length)
        text, pooled, _ = encoders.pipeline.encode_prompt(
            prompt=list(captions), prompt_2=None, device=encoders.device, max_sequence_length=length
        )
        return {"text": text.cpu(), "pooled": pooled.cpu()}

    def blank_text(self) -> dict[str, Tensor]:
        widths = self.denoiser_config
        text = torch.zeros(self.text_length(512, "tokenizer_2"), widths["joint_attention_dim"])
        return {"text": text, "pooled": torch.zeros(widths["pooled_projection_dim"])}

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels = shapes["img_in.weight"]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        return {
            "in_channels": channels,
            "num_layers": layers(shapes, "double_blocks."),
            "num_single_layers": layers(shapes, "single_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["txt_in.weight"][1],
            "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        }

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"].float()
        count, _, height, width = clean.shape
        t = self.times(clean, keys)
        e = noise(keys, clean.shape[1:])
        inputs = {
            "hidden_states": pack(mix(clean, e, t)),
            "encoder_hidden_states": batch["text"].float(),
            "pooled_projections": batch["pooled"].float(),
            "timestep": t,
            "img_ids": positions(height // 2, width // 2),
            "txt_ids": torch.zeros(batch["text"].shape[1], 3),
            "guidance": torch.full((count,), self.config.guidance) if self.denoiser_config["guidance_embeds"] else None,
        }
        return inputs, [(pack(e - clean), None)]

    def spread(self, mask: Tensor, target: Tensor) -> Tensor:
        return pack(mask.expand(-1, target.shape[-1] // 4, -1, -1))

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": text["text"], "pooled_prompt_embeds": text["pooled"]}

    def pack(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return unpack(packed, like)


def latents_of(encoders: Encoders, pixels: Tensor) -> Tensor:
    """B C h w, the mode of the posterior for pictures B C 1 H W, shifted and scaled as the VAE's config says."""
    vae = encoders.vae
    mode = vae.encode(pixels[:, :, 0].to(encoders.device, vae.dtype)).latent_dist.mode()
    return ((mode - vae.config.shift_factor) * vae.config.scaling_factor).float().cpu()


def pack(latents: Tensor) -> Tensor:
    """B C h w to B (h/2 w/2) (4 C): one token per 2 x 2 cells, channels outermost, as Flux's pipeline packs them."""
    count, channels, height, width = latents.shape
    cells = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(count, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """What ``pack`` made of latents of the shape of ``like``, back."""
    count, channels, height, width = like.shape
    cells = tokens.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(count, channels, height, width)


def positions(rows: int, columns: int) -> Tensor:
    """(0, row, column) of each token, rows x columns of them."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    return ids.view(-1, 3)
