"""Chroma1: Flux without guidance, pooled text and modulation layers of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.flow import Key, mix, noise
from diffpipe.models import flux
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.encoders import Encoders
from diffpipe.models.names import Originals, Shapes, linear
from diffpipe.models.padding import Processor, install


def original_shapes() -> Shapes:
    """The names of lodestones' checkpoints: Flux's blocks, and one network that makes the modulation of all of them."""
    w, hidden = 3072, 5120
    kept = ("img_in.", "txt_in.", "double_blocks.", "single_blocks.", "final_layer.linear.")
    shapes = {n: s for n, s in flux.original_shapes().items() if n.startswith(kept) and "_mod." not in n and ".modulation." not in n}
    network = "distilled_guidance_layer"
    shapes |= linear(f"{network}.in_proj", hidden, 64) | linear(f"{network}.out_proj", w, hidden)
    shapes |= linear(f"{network}.layers.0.in_layer", hidden, hidden) | linear(f"{network}.layers.0.out_layer", hidden, hidden)
    return shapes | {f"{network}.norms.0.scale": (hidden,)}


class JointAttention(Processor):
    """The caption comes first; in blocks that have layers for it, it comes apart from the picture."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        caption = encoder_hidden_states
        query, key, value = self.heads(attn, hidden_states)
        if caption is not None:
            own, mine = self.caption_heads(attn, caption), (query, key, value)
            query, key, value = (torch.cat(pair, 1) for pair in zip(own, mine, strict=True))
        query, key = (self.placed(x, image_rotary_emb) for x in (query, key))
        out = self.attend(query, key, value, attention_mask)
        if caption is None:
            return out
        count = caption.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, count:])), attn.to_add_out(out[:, :count])


class Chroma(DiffusionModel):
    """The official training (lodestone-rock/flow, src/models/chroma/model.py) never changes ``distilled_guidance_layer``: it runs
    it without gradients. Here a full fine-tune trains it like all else, so that what trains is what the config says; a group
    ``{match: ^distilled_guidance_layer, lr: 0}`` in ``optimizer.groups`` keeps it as it was. Adapters leave it alone."""

    name = "chroma"
    title = "Chroma1 HD, Base, Flash"
    spec = StageSpec(
        ("transformer_blocks.*", "single_transformer_blocks.*"), carry=("distilled_guidance_layer",), post=("norm_out", "proj_out")
    )
    geometry = Geometry(spatial=8)
    denoiser = "ChromaTransformer2DModel"
    pipeline = "ChromaPipeline"
    originals = Originals(denoiser, original_shapes, repeats=("blocks", "distilled_guidance_layer"))
    waits = True
    guided = "classifier-free"

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C h w, those of Flux."""
        return {"latents": flux.latents_of(encoders, pixels)}

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """``text`` L D from T5 (at most 512 tokens, padded), ``attended`` L: true for the caption and one token of padding."""
        length = min(512, encoders.pipeline.tokenizer.model_max_length)
        text, _, attended, *_ = encoders.pipeline.encode_prompt(
            prompt=list(captions), do_classifier_free_guidance=False, device=encoders.device, max_sequence_length=length
        )
        return {"text": text.cpu(), "attended": attended.bool().cpu()}

    def blank_text(self) -> dict[str, Tensor]:
        length = self.text_length(512)
        return {"text": torch.zeros(length, self.denoiser_config["joint_attention_dim"]), "attended": torch.ones(length, dtype=torch.bool)}

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, channels = shapes["img_in.weight"]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        hidden, inputs = shapes["distilled_guidance_layer.in_proj.weight"]
        return {
            "in_channels": channels,
            "num_layers": layers(shapes, "double_blocks."),
            "num_single_layers": layers(shapes, "single_blocks."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["txt_in.weight"][1],
            "approximator_num_channels": inputs,
            "approximator_hidden_dim": hidden,
            "approximator_layers": layers(shapes, "distilled_guidance_layer.layers."),
        }

    def make_module(self) -> nn.Module:
        module = super().make_module()
        install(module, JointAttention)
        return module

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"].float()
        count, _, height, width = clean.shape
        rows, columns = height // 2, width // 2
        t = self.times(clean, keys)
        e = noise(keys, clean.shape[1:])
        inputs = {
            "hidden_states": flux.pack(mix(clean, e, t)),
            "encoder_hidden_states": batch["text"].float(),
            "timestep": t,
            "img_ids": flux.positions(rows, columns),
            "txt_ids": torch.zeros(batch["text"].shape[1], 3),
            # Boolean, each sample's own: a mask of ones and zeros would be added to the attention's scores, and mask nothing.
            "attention_mask": torch.cat([batch["attended"], torch.ones(count, rows * columns, dtype=torch.bool)], 1),
        }
        return inputs, [(flux.pack(e - clean), None)]

    def spread(self, mask: Tensor, target: Tensor) -> Tensor:
        return flux.pack(mask.expand(-1, target.shape[-1] // 4, -1, -1))

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        """With boolean masks, as in training; those that the pipeline makes of ones and zeros mask nothing."""
        given = {"prompt_embeds": text["text"], "prompt_attention_mask": text["attended"]}
        if negative is not None:
            given |= {"negative_prompt_embeds": negative["text"], "negative_prompt_attention_mask": negative["attended"]}
        return given

    def pack(self, latents: Tensor) -> Tensor:
        return flux.pack(latents)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        return flux.unpack(packed, like)
