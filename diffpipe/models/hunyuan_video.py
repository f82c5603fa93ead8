"""HunyuanVideo text to video, the 13B model with distilled guidance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.errors import CheckpointError
from diffpipe.flow import Key, mix, noise
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.encoders import Encoders
from diffpipe.models.names import Originals, Shapes, linear
from diffpipe.models.padding import Processor, install

# ComfyUI's files have the names of its own code: what is another there, and what it is originally.
COMFYUI = (
    (r"((?:time_in|guidance_in|t_embedder)\.)in_layer\.", r"\1mlp.0."),
    (r"((?:time_in|guidance_in|t_embedder)\.)out_layer\.", r"\1mlp.2."),
    (r"c_embedder\.in_layer\.", "c_embedder.linear_1."),
    (r"c_embedder\.out_layer\.", "c_embedder.linear_2."),
    (r"(_mod|\.modulation)\.lin\.", r"\1.linear."),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_attn\.norm\.(q|k)(?:uery|ey)_norm\.scale$", r"_attn_\1_norm.weight"),
    (r"\.norm\.(q|k)(?:uery|ey)_norm\.scale$", r".\1_norm.weight"),
    (r"(blocks\.\d+\.(?:img_|txt_)?mlp)\.0\.", r"\1.fc1."),
    (r"(blocks\.\d+\.(?:img_|txt_)?mlp)\.2\.", r"\1.fc2."),
)


def original_shapes() -> Shapes:
    """Tencent's names."""
    w, head = 3072, 128
    shapes: Shapes = {"img_in.proj.weight": (w, 16, 1, 2, 2), "img_in.proj.bias": (w,)}
    for embed in ("time_in", "guidance_in", "txt_in.t_embedder"):
        shapes |= linear(f"{embed}.mlp.0", w, 256) | linear(f"{embed}.mlp.2", w, w)
    shapes |= linear("vector_in.in_layer", w, 768) | linear("vector_in.out_layer", w, w)
    shapes |= linear("txt_in.input_embedder", w, 4096) | linear("txt_in.c_embedder.linear_1", w, 4096)
    shapes |= linear("txt_in.c_embedder.linear_2", w, w)
    for i in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{i}"
        shapes |= {f"{block}.norm{n}.{kind}": (w,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= linear(f"{block}.self_attn_qkv", 3 * w, w) | linear(f"{block}.self_attn_proj", w, w)
        shapes |= linear(f"{block}.mlp.fc1", 4 * w, w) | linear(f"{block}.mlp.fc2", w, 4 * w)
        shapes |= linear(f"{block}.adaLN_modulation.1", 2 * w, w)
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes |= linear(f"{block}_mod.linear", 6 * w, w) | linear(f"{block}_attn_qkv", 3 * w, w) | linear(f"{block}_attn_proj", w, w)
        shapes |= {f"{block}_attn_{n}_norm.weight": (head,) for n in "qk"}
        shapes |= linear(f"{block}_mlp.fc1", 4 * w, w) | linear(f"{block}_mlp.fc2", w, 4 * w)
    single = "single_blocks.0"
    shapes |= linear(f"{single}.linear1", 7 * w, w) | linear(f"{single}.linear2", w, 5 * w)
    shapes |= linear(f"{single}.modulation.linear", 3 * w, w)
    shapes |= {f"{single}.{n}_norm.weight": (head,) for n in "qk"}
    return shapes | linear("final_layer.linear", 64, w) | linear("final_layer.adaLN_modulation.1", 2 * w, w)


class JointAttention(Processor):
    """The clip comes first, and alone has places; a caption without layers of its own goes through the clip's."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor, image_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        clip, caption, count = hidden_states, encoder_hidden_states, hidden_states.shape[1]
        apart = attn.add_q_proj is not None
        query, key, value = self.heads(attn, clip if apart else torch.cat([clip, caption], 1))
        query, key = (torch.cat([self.placed(x[:, :count], image_rotary_emb), x[:, count:]], 1) for x in (query, key))
        if apart:
            mine, own = (query, key, value), self.caption_heads(attn, caption)
            query, key, value = (torch.cat(pair, 1) for pair in zip(mine, own, strict=True))
        out = self.attend(query, key, value, attention_mask)
        clip, caption = out[:, :count], out[:, count:]
        return (attn.to_out[1](attn.to_out[0](clip)), attn.to_add_out(caption)) if apart else (clip, caption)


class HunyuanVideo(DiffusionModel):
    name = "hunyuan-video"
    title = "HunyuanVideo t2v"
    spec = StageSpec(("transformer_blocks.*", "single_transformer_blocks.*"), carry=("time_text_embed",), post=("norm_out", "proj_out"))
    geometry = Geometry(spatial=8, temporal=4, fps=24)
    denoiser = "HunyuanVideoTransformer3DModel"
    pipeline = "HunyuanVideoPipeline"
    originals = Originals(denoiser, original_shapes)
    prefixes = ("model.model.", *DiffusionModel.prefixes)
    options = frozenset({"model.guidance"})
    guided = "distilled"

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C f h w, the mode of the posterior, scaled; encoded in tiles, as the official code does."""
        frames = pixels.shape[2]
        if frames != self.geometry.frames(frames):
            raise ValueError(f"{frames} frames: the VAE takes a multiple of {self.geometry.temporal} and one")
        vae = encoders.vae
        vae.enable_tiling()
        mode = vae.encode(pixels.to(encoders.device, vae.dtype)).latent_dist.mode()
        return {"latents": (mode * vae.config.scaling_factor).float().cpu()}

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """``text`` L D from Llama inside the pipeline's template for videos, without the template's part (at most 256 tokens, padded),
        ``text_mask`` L of what is caption, ``pooled`` D from CLIP."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        tokenizer = encoders.pipeline.tokenizer
        tokenizer.padding_side = "right"  # the template's part is cut off at the left by its length
        length = min(256, tokenizer.model_max_length - DEFAULT_PROMPT_TEMPLATE["crop_start"])
        text, pooled, mask = encoders.pipeline.encode_prompt(prompt=list(captions), device=encoders.device, max_sequence_length=length)
        return {"text": text.cpu(), "text_mask": mask.bool().cpu(), "pooled": pooled.cpu()}

    def blank_text(self) -> dict[str, Tensor]:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        before, widths = DEFAULT_PROMPT_TEMPLATE["crop_start"], self.denoiser_config
        length = self.text_length(256 + before) - before
        return {
            "text": torch.zeros(length, widths["text_embed_dim"]),
            "text_mask": torch.ones(length, dtype=torch.bool),
            "pooled": torch.zeros(widths["pooled_projection_dim"]),
        }

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels, *patch = shapes["img_in.proj.weight"]
        head = shapes["double_blocks.0.img_attn_q_norm.weight"][0]
        out = shapes["final_layer.linear.weight"][0] // (patch[0] * patch[1] * patch[2])
        return {
            "in_channels": channels,
            "out_channels": out,
            "num_layers": layers(shapes, "double_blocks."),
            "num_single_layers": layers(shapes, "single_blocks."),
            "num_refiner_layers": layers(shapes, "txt_in.individual_token_refiner.blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
            "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
            "guidance_embeds": "guidance_in.mlp.0.weight" in shapes,
        }

    def class_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config as it is.

        Raises:
            CheckpointError: when it is another model of the same class.
        """
        told = None
        if config["in_channels"] != config["out_channels"] or config.get("image_condition_type") is not None:
            told = "it takes an image beside the text"
        elif not config["guidance_embeds"]:
            told = "it has no guidance embedding"
        if told is not None:
            raise CheckpointError(told, where=self.blueprint[self.component].origin, expected=self.title, fix="name that of text to video")
        return dict(config)

    def original_name(self, name: str) -> str:
        for pattern, replacement in COMFYUI:
            name = re.sub(pattern, replacement, name)
        return name

    def make_module(self) -> nn.Module:
        module = super().make_module()
        install(module, JointAttention)
        return module

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"].float()
        count = len(clean)
        t = self.times(clean, keys)
        e = noise(keys, clean.shape[1:])
        inputs = {
            "hidden_states": mix(clean, e, t),
            "timestep": 1000 * t,
            "encoder_hidden_states": batch["text"].float(),
            "encoder_attention_mask": batch["text_mask"],
            "pooled_projections": batch["pooled"].float(),
            "guidance": torch.full((count,), 1000 * self.config.guidance),
        }
        return inputs, [(e - clean, None)]

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"prompt_embeds": text["text"], "pooled_prompt_embeds": text["pooled"], "prompt_attention_mask": text["text_mask"]}
