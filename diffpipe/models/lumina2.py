"""Lumina Image 2.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.flow import Key, mix, noise
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.encoders import Encoders
from diffpipe.models.flux import latents_of
from diffpipe.models.names import Originals, Shapes, linear


def original_shapes() -> Shapes:
    """Alpha-VLLM's names."""
    w, time, text, head, groups = 2304, 1024, 2304, 96, 8
    shapes = linear("x_embedder", w, 64) | {"cap_embedder.0.weight": (text,)} | linear("cap_embedder.1", w, text)
    shapes |= linear("t_embedder.mlp.0", time, 256) | linear("t_embedder.mlp.2", time, time)
    for block in ("layers.0", "noise_refiner.0", "context_refiner.0"):
        for name, rows in (("qkv", w + 2 * groups * head), ("out", w)):
            shapes |= linear(f"{block}.attention.{name}", rows, w, bias=False)
        shapes |= {f"{block}.attention.{n}_norm.weight": (head,) for n in "qk"}
        shapes |= {f"{block}.{n}.weight": (w,) for n in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")}
        for name, rows, columns in (("w1", 4 * w, w), ("w2", w, 4 * w), ("w3", 4 * w, w)):
            shapes |= linear(f"{block}.feed_forward.{name}", rows, columns, bias=False)
        if block != "context_refiner.0":
            shapes |= linear(f"{block}.adaLN_modulation.1", 4 * w, time)
    return shapes | linear("final_layer.linear", 64, w) | linear("final_layer.adaLN_modulation.1", w, time)


class Lumina2(DiffusionModel):
    name = "lumina2"
    title = "Lumina Image 2.0"
    # Of the caption's embedding only what the refiners make of it goes on, inside the units' stream.
    spec = StageSpec(("layers.*",), carry=("time_caption_embed.timestep_embedder",), post=("norm_out",), lengths="encoder_attention_mask")
    geometry = Geometry(spatial=8)
    denoiser = "Lumina2Transformer2DModel"
    high_precision = (r"norm1\.linear",)  # modulation, a ninth of a block
    pipeline = "Lumina2Pipeline"
    originals = Originals(denoiser, original_shapes, repeats=("layers", "refiner"), ignored=(r"^norm_final\.weight$",))
    waits = True
    guided = "classifier-free"

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C h w, the mode of the posterior."""
        return {"latents": latents_of(encoders, pixels)}

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """``text`` L D from Gemma, the pipeline's system prompt before the caption (at most 256 tokens, padded), ``text_mask`` L."""
        length = min(256, encoders.pipeline.tokenizer.model_max_length)
        text, mask, _, _ = encoders.pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=encoders.device, max_sequence_length=length
        )
        return {"text": text.cpu(), "text_mask": mask.bool().cpu()}

    def encode_negative(self, encoders: Encoders, texts: Sequence[str]) -> dict[str, Tensor]:
        """Without the system prompt, as the pipeline has it."""
        length = min(256, encoders.pipeline.tokenizer.model_max_length)
        _, _, text, mask = encoders.pipeline.encode_prompt(
            list(texts), negative_prompt=list(texts), device=encoders.device, max_sequence_length=length
        )
        return {"text": text.cpu(), "text_mask": mask.bool().cpu()}

    def blank_text(self) -> dict[str, Tensor]:
        length = self.text_length(256)
        return {"text": torch.zeros(length, self.denoiser_config["cap_feat_dim"]), "text_mask": torch.ones(length, dtype=torch.bool)}

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        width, text = shapes["cap_embedder.1.weight"]
        head = shapes["layers.0.attention.q_norm.weight"][0]
        patch = int(self.blueprint[self.component].config["patch_size"])
        return {
            "in_channels": shapes["x_embedder.weight"][1] // patch**2,
            "hidden_size": width,
            "num_layers": layers(shapes, "layers."),
            "num_refiner_layers": layers(shapes, "context_refiner."),
            "num_attention_heads": width // head,
            "num_kv_heads": (shapes["layers.0.attention.qkv.weight"][0] - width) // (2 * head),
            "cap_feat_dim": text,
        }

    def adapter_targets(self, module: nn.Module) -> list[str]:
        """Every linear layer in a block, the refiners' too, as kohya's and other trainers have it."""
        blocks = ("layers.", "noise_refiner.", "context_refiner.")
        return [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)]

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        """The class counts time from noise to picture, and predicts that way too."""
        clean = batch["latents"].float()
        t = self.times(clean, keys)
        e = noise(keys, clean.shape[1:])
        inputs = {
            "hidden_states": mix(clean, e, t),
            "timestep": 1 - t,
            "encoder_hidden_states": batch["text"].float(),
            "encoder_attention_mask": batch["text_mask"],
        }
        return inputs, [(clean - e, None)]

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        given = {"prompt_embeds": text["text"], "prompt_attention_mask": text["text_mask"]}
        if negative is not None:
            given |= {"negative_prompt_embeds": negative["text"], "negative_prompt_attention_mask": negative["text_mask"]}
        return given
