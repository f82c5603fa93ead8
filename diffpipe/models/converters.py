"""Gives VAEs and text encoders of single files the names of their classes; each kind of file has one entry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

from torch import Tensor

from diffpipe.errors import CheckpointError
from diffpipe.models.blueprint import Component
from diffpipe.models.weights import Lazy, within

Tensors = dict[str, Tensor]

# What stands before a component's names in a file that holds several components.
PREFIXES: dict[str, tuple[str, ...]] = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("conditioner.embedders.0.transformer.", "cond_stage_model.", "text_encoders.gemma2_2b.transformer.", "text_encoders."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
    "image_encoder": ("visual.",),
}
NOT_NETWORK = ("spiece_model", "tokenizer", "logit_scale", "position_ids")  # what files hold beside a network's weights


def own_tensors(component: Component, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Those tensors of a file that are the component's, under the file's names without what stands before them."""
    own = within(tensors, PREFIXES.get(component.name, ()))
    return {n: t for n, t in own.items() if not n.endswith(NOT_NETWORK)}


def to_library_names(component: Component, tensors: Mapping[str, Lazy]) -> Tensors:
    """The component's tensors under the names of its class, whoever wrote the file.

    Raises:
        CheckpointError: when the file's names are none that are known for the class.
    """
    own = own_tensors(component, tensors)
    for mark, convert in CONVERTERS.get(component.kind, {}).items():
        if any(mark in name for name in own):
            try:
                return convert(dict(own), component.config)
            except (KeyError, RuntimeError, ValueError, IndexError) as fault:
                raise CheckpointError(f"its tensors are not those of a {component.kind}: {fault!r}", where=component.origin) from fault
    return dict(own)


def _ldm_vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """CompVis' AutoencoderKL, as in SD, SDXL and Flux files."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return convert_ldm_vae_checkpoint(tensors, config)


def _wan_vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(tensors)


def _ltx_vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Lightricks' video VAE of every version; diffusers knows them from one file with the transformer."""
    from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers

    return convert_ltx_vae_checkpoint_to_diffusers({f"vae.{n}": t for n, t in tensors.items()})


def _cosmos_vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """NVIDIA's causal video tokenizer, as in ComfyUI's file; its statistics of latents are those that the class has."""
    table = {
        r"(conv\w+)\.0\.conv3d\.": r"\1.conv_s.",
        r"(conv\w+)\.1\.conv3d\.": r"\1.conv_t.",
        r"\.conv3d\.": ".",
        r"nin_shortcut\.": "conv_shortcut.",
        r"mid\.block_([12])\.": lambda m: f"mid_block.resnets.{int(m[1]) - 1}.",
        r"mid\.attn_1\.0\.": "mid_block.attentions.0.",
        r"mid\.attn_1\.1\.": "mid_block.temp_attentions.0.",
        r"\.([qkv])\.": r".to_\1.",
        r"proj_out\.": "to_out.0.",
        r"down\.(\d)\.": r"down_blocks.\1.",
        # Counted from the outside in, the decoder's run from the inside out.
        r"up\.(\d)\.": lambda m: f"up_blocks.{len(config['decode_block_out_channels']) - 2 - int(m[1])}.",
        r"\.block\.": ".resnets.",
        r"(down|up)sample\.": r"\1samplers.0.",
    }
    named: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("wavelets", "_arange", "patch_size_buffer", "latent_mean", "latent_std")):
            named[reduce(lambda n, rule: re.sub(rule[0], rule[1], n), table.items(), name)] = tensor
    return named


def _hunyuan_video_vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """HunyuanVideo's VAE under the names of ComfyUI's code; Tencent's own are those of the class."""
    last = len(config["block_out_channels"]) - 1
    table = {
        r"nin_shortcut\.": "conv_shortcut.",
        r"norm_out\.": "conv_norm_out.",
        r"mid\.block_([12])\.": lambda m: f"mid_block.resnets.{int(m[1]) - 1}.",
        r"mid\.attn_1\.norm\.": "mid_block.attentions.0.group_norm.",
        r"mid\.attn_1\.proj_out\.": "mid_block.attentions.0.to_out.0.",
        r"mid\.attn_1\.([qkv])\.": r"mid_block.attentions.0.to_\1.",
        r"down\.(\d)\.": r"down_blocks.\1.",
        # Counted from the outside in, the decoder's run from the inside out.
        r"up\.(\d)\.": lambda m: f"up_blocks.{last - int(m[1])}.",
        r"\.block\.": ".resnets.",
        r"(down|up)sample\.": r"\1samplers.0.",
    }
    named = {reduce(lambda n, rule: re.sub(rule[0], rule[1], n), table.items(), name): t for name, t in tensors.items()}
    # A linear layer is stored as a convolution of one cell.
    return {n: t.flatten(1) if ".attentions." in n and t.ndim > 2 else t for n, t in named.items()}


def _language_model(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The layers of a language model, without its head and without the eyes of the larger model that it may be a part of."""
    plain = {re.sub(r"^((language_)?model\.)+", "", name): t for name, t in tensors.items()}
    return {n: t for n, t in plain.items() if not n.startswith(("lm_head.", "vision_tower.", "multi_modal_projector."))}


def _wan_umt5(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Alibaba's own UMT5, as in the official .pth and Kijai's files."""
    table = {
        "attn.q.": "layer.0.SelfAttention.q.",
        "attn.k.": "layer.0.SelfAttention.k.",
        "attn.v.": "layer.0.SelfAttention.v.",
        "attn.o.": "layer.0.SelfAttention.o.",
        "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
        "norm1.": "layer.0.layer_norm.",
        "norm2.": "layer.1.layer_norm.",
        "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
        "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
        "ffn.fc2.": "layer.1.DenseReluDense.wo.",
    }
    named: Tensors = {}
    for name, tensor in tensors.items():
        if name == "token_embedding.weight":
            named["shared.weight"] = tensor
        elif name == "norm.weight":
            named["encoder.final_layer_norm.weight"] = tensor
        else:
            _, number, rest = name.split(".", 2)
            old = next((o for o in table if rest.startswith(o)), None)
            named[name if old is None else f"encoder.block.{number}.{table[old]}{rest.removeprefix(old)}"] = tensor
    return named


def _wan_clip(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The picture half of Alibaba's own CLIP, as in the official .pth and Kijai's file."""
    outside = {"patch_embedding.": "embeddings.patch_embedding.", "pre_norm.": "pre_layrnorm.", "post_norm.": "post_layernorm."}
    inside = {
        "norm1.": "layer_norm1.",
        "norm2.": "layer_norm2.",
        "attn.proj.": "self_attn.out_proj.",
        "mlp.0.": "mlp.fc1.",
        "mlp.2.": "mlp.fc2.",
    }
    named: Tensors = {
        "embeddings.class_embedding": tensors.pop("cls_embedding").flatten(),
        "embeddings.position_embedding.weight": tensors.pop("pos_embedding").squeeze(0),
    }
    for name, tensor in tensors.items():
        block, number, rest = name.split(".", 2) if name.startswith("transformer.") else ("", "", name)
        layer = f"encoder.layers.{number}." if block else ""
        old = next((o for o in (inside if block else outside) if rest.startswith(o)), None)
        if old is not None:
            named[layer + (inside if block else outside)[old] + rest.removeprefix(old)] = tensor
        elif rest.startswith("attn.to_qkv."):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{layer}self_attn.{part}_proj.{rest.removeprefix('attn.to_qkv.')}"] = rows
        elif name not in ("head", "log_scale"):  # of the comparison with captions
            named[name] = tensor
    return {f"vision_model.{n}": t for n, t in named.items()}


def _clip_vision(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """A CLIPVisionModelWithProjection, as ComfyUI's clip_vision files are."""
    return {n: t for n, t in tensors.items() if not n.startswith("visual_projection.")}


def _open_clip(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """OpenCLIP's text half, as in SDXL's files: q, k and v in one, the projection turned over."""
    inside = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1"}
    inside["mlp.c_proj"] = "mlp.fc2"
    outside = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    named: Tensors = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)", name)
        layer = f"text_model.encoder.layers.{found[1]}" if found else ""
        if found and found[2] == "attn.in_proj":
            named |= {f"{layer}.self_attn.{n}_proj.{found[3]}": part for n, part in zip("qkv", tensor.chunk(3), strict=True)}
        elif found:
            named[f"{layer}.{inside[found[2]]}.{found[3]}"] = tensor
        elif name == "text_projection":
            named["text_projection.weight"] = tensor.T
        else:
            named[outside.get(name, name)] = tensor
    return named


def _without_projection(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """CLIP's text half of a file that has the projection to pictures too."""
    return {n: t for n, t in tensors.items() if "text_projection" not in n}


# By class: a component of a name that only one kind of file has, and what turns such a file into the class' names.
CONVERTERS: dict[str, dict[str, Callable[[Tensors, Mapping[str, Any]], Tensors]]] = {
    "AutoencoderKL": {"encoder.down.0.block": _ldm_vae},
    "AutoencoderKLCosmos": {"encoder.mid.block_1.": _cosmos_vae},
    "AutoencoderKLHunyuanVideo": {"encoder.down.0.block": _hunyuan_video_vae},
    "AutoencoderKLLTXVideo": {"per_channel_statistics.": _ltx_vae},
    "AutoencoderKLWan": {"encoder.downsamples.": _wan_vae},
    "CLIPTextModel": {"text_projection": _without_projection},
    "CLIPTextModelWithProjection": {"transformer.resblocks.": _open_clip},
    "CLIPVisionModel": {"cls_embedding": _wan_clip, "visual_projection.": _clip_vision},
    "Gemma2Model": {"model.layers.": _language_model},
    "LlamaModel": {"model.layers.": _language_model},
    "UMT5EncoderModel": {"token_embedding.weight": _wan_umt5},
}
