"""The names of Stable Diffusion XL's original checkpoint: UNet, VAE and OpenCLIP's text encoder, made from diffusers' parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffpipe.models.names import Originals, Shapes

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
TRANSFORMER = (
    *(f"attn{i}.{n}" for i in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out.0")),
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
)
ATTENTION = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{n}" for n in TRANSFORMER))
OUTSIDE = ("input_blocks.0.0", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.0", "out.2")


@cache
def unet_originals(down: tuple[str, ...], up: tuple[str, ...], layers: int) -> Originals:
    """Stability's names of a UNet.

    Args:
        down, up: diffusers' kinds of its blocks.
        layers: resnets in each block on the way down.
    """

    def shapes() -> Shapes:
        found = [*OUTSIDE, *_resnet("middle_block.0"), *_attention("middle_block.1"), *_resnet("middle_block.2")]
        number = 1
        for level, kind in enumerate(down):
            for block in (f"input_blocks.{number + i}" for i in range(layers)):
                found += [*_resnet(f"{block}.0"), *(_attention(f"{block}.1") if "CrossAttn" in kind else ())]
            number += layers + 1
            found += [f"input_blocks.{number - 1}.0.op"] if level < len(down) - 1 else []
        number = 0
        for level, kind in enumerate(up):
            for block in (f"output_blocks.{number + i}" for i in range(layers + 1)):
                found += [*_resnet(f"{block}.0"), *(_attention(f"{block}.1") if "CrossAttn" in kind else ())]
            number += layers + 1
            found += [f"output_blocks.{number - 1}.{2 if 'CrossAttn' in kind else 1}.conv"] if level < len(up) - 1 else []
        # Each is one whole parameter of diffusers', whatever its shape; a name that this model lacks is left out of its map.
        bare = ("to_q", "to_k", "to_v")
        return {f"{name}.{leaf}": (1,) for name in found for leaf in (("weight",) if name.endswith(bare) else ("weight", "bias"))}

    config = {"layers_per_block": layers, "addition_embed_type": "text_time"}
    return Originals("UNet2DConditionModel", shapes, config, convert=_to_diffusers, inside="transformer_blocks")


def _resnet(block: str) -> list[str]:
    return [f"{block}.{part}" for part in RESNET]


def _attention(block: str) -> list[str]:
    return [f"{block}.{part}" for part in ATTENTION]


def _to_diffusers(checkpoint: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint({f"{UNET}{name}": tensor for name, tensor in checkpoint.items()}, config)


# -- components that diffpipe writes beside the UNet -------------------------------------------------------------------

VAE_NAMES = {
    r"down_blocks\.(\d+)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.(\d+)\.resnets": r"up.\1.block",
    r"up_blocks\.(\d+)\.upsamplers\.0": r"up.\1.upsample",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    r"to_out\.0": "proj_out",
    r"to_([qkv])\.": r"\1.",
}
OPEN_CLIP_NAMES = {
    r"^text_model\.final_layer_norm": "ln_final",
    r"^text_model\.encoder\.layers\.": "transformer.resblocks.",
    "layer_norm": "ln_",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
    r"^text_model\.embeddings\.token_embedding": "token_embedding",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
}


def vae_originals(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL under CompVis' names, which count the blocks on the way up from the last."""
    levels = len({found[1] for name in tensors if (found := re.match(r"decoder\.up_blocks\.(\d+)", name))})
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        turned = re.sub(r"(?<=up_blocks\.)\d+", lambda found: str(levels - 1 - int(found[0])), name)
        # Its attention was written with convolutions of one cell.
        cell = ".attentions." in name and tensor.ndim == 2
        named[_replaced(turned, VAE_NAMES)] = tensor[..., None, None] if cell else tensor
    return named


def open_clip_originals(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModelWithProjection under OpenCLIP's names, where q, k and v are one and the projection lies on its side."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        joined = re.fullmatch(r"(.+)\.self_attn\.q_proj\.(weight|bias)", name)
        if joined:
            run = torch.cat([tensors[f"{joined[1]}.self_attn.{n}_proj.{joined[2]}"] for n in "qkv"])
            named[_replaced(f"{joined[1]}.attn.in_proj_{joined[2]}", OPEN_CLIP_NAMES)] = run
        elif name == "text_projection.weight":
            named["text_projection"] = tensor.T
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            named[_replaced(name, OPEN_CLIP_NAMES)] = tensor
    return named


def _replaced(name: str, table: Mapping[str, str]) -> str:
    for pattern, word in table.items():
        name = re.sub(pattern, word, name)
    return name
