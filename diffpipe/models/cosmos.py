"""Cosmos Predict1 text to world, 7B and 14B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpipe import edm
from diffpipe.errors import CheckpointError
from diffpipe.flow import Key, noise
from diffpipe.models.base import DiffusionModel, Geometry, StageSpec, Targets, layers
from diffpipe.models.encoders import Encoders
from diffpipe.models.names import Originals, Shapes, linear

DATA = 0.5  # sigma_data: the deviation that latents have
FPS = 24  # the default rate of NVIDIA's text2world.py, at which positions in time are whole numbers (base_fps of the RoPE)


def original_shapes() -> Shapes:
    """NVIDIA's names for the 7B model, without their ``net.``; diffusers' converter knows them by block 1."""
    w, low, head = 4096, 256, 128
    shapes: Shapes = {"x_embedder.proj.1.weight": (w, 68), "affline_norm.weight": (w,), "final_layer.linear.weight": (64, w)}
    shapes |= {f"extra_pos_embedder.pos_emb_{axis}": (length, w) for axis, length in (("t", 128), ("h", 120), ("w", 120))}
    shapes |= {"t_embedder.1.linear_1.weight": (w, w), "t_embedder.1.linear_2.weight": (3 * w, w)}
    shapes |= _modulation("final_layer", 2 * w, w, low)
    for part in range(3):
        block = f"blocks.block1.blocks.{part}"
        shapes |= _modulation(block, 3 * w, w, low)
        if part == 2:
            shapes |= linear(f"{block}.block.layer1", 4 * w, w, bias=False) | linear(f"{block}.block.layer2", w, 4 * w, bias=False)
            continue
        inner = w if part == 0 else 1024
        for name, columns in (("to_q.0", w), ("to_k.0", inner), ("to_v.0", inner), ("to_out.0", w)):
            shapes |= linear(f"{block}.block.attn.{name}", w, columns, bias=False)
        shapes |= {f"{block}.block.attn.to_{n}.1.weight": (head,) for n in "qk"}
    return shapes


def _modulation(layer: str, rows: int, width: int, low: int) -> Shapes:
    return {f"{layer}.adaLN_modulation.1.weight": (low, width), f"{layer}.adaLN_modulation.2.weight": (rows, low)}


class _Kept(dict[str, Tensor]):
    def pop(self, name: str) -> Tensor:
        return self[name]


def convert(checkpoint: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' converter. It tells Predict1 from Predict2 by a name with ``net.``, which it looks for when it has taken all names
    out (0.42.1), so that it takes every file for Predict2 unless they stay."""
    from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers

    return convert_cosmos_transformer_checkpoint_to_diffusers(_Kept({f"net.{name}": t for name, t in checkpoint.items()}))


class NoChecker:
    """Where the pipeline insists on NVIDIA's checker of what it generates: nothing is generated here. Its licence wants the checker
    for what is, so this family has no previews until that is run on them."""


class Cosmos(DiffusionModel):
    """``forward`` appends a channel that marks padding, resized with torchvision. Nothing is padded here, so ``prepare`` appends it,
    all zero, and the class is made without that part and for a channel more; its weights are the same."""

    name = "cosmos"
    title = "Cosmos Predict1 text2world 7B, 14B"
    spec = StageSpec(("transformer_blocks.*",), carry=("time_embed",), replicate=("learnable_pos_embed",), post=("norm_out", "proj_out"))
    geometry = Geometry(spatial=8, temporal=8, fps=FPS)
    denoiser = "CosmosTransformer3DModel"
    high_precision = (r"norm\d\.linear_",)  # modulation, a twentieth of a block
    pipeline = "CosmosTextToWorldPipeline"
    originals = Originals(denoiser, original_shapes, convert=convert, ignored=(r"^logvar\.", r"^pos_embedder\.", r"_extra_state$"))
    prefixes = ("net.", *DiffusionModel.prefixes)
    written = "net."
    unused = frozenset({"safety_checker"})
    process = "EDM"

    def make_pipeline(self, components: dict[str, Any]) -> Any:
        return super().make_pipeline({**components, "safety_checker": NoChecker()})

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` C f h w, each channel of each latent frame to mean 0 and deviation 0.5.

        A picture is a first frame, as in diffusers' pipeline and in ComfyUI; NVIDIA's own code has other statistics for pictures.
        """
        frames = pixels.shape[2]
        if frames != self.geometry.frames(frames):
            raise ValueError(f"{frames} frames: Cosmos takes 8 k + 1")
        latents = encoders.vae.encode(pixels.to(encoders.device, encoders.vae.dtype)).latent_dist.mode()
        mean, std = self._statistics(encoders.vae, latents)
        return {"latents": ((latents - mean) / std * DATA).float().cpu()}

    def denormalise(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._statistics(vae, latents)
        return latents / DATA * std + mean

    def _statistics(self, vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel of each of the ``latents``' frames, 1 C f 1 1."""
        count = latents.shape[2]
        most = len(vae.config.latents_mean) // vae.config.latent_channels
        if count > most:
            raise ValueError(
                f"{self.geometry.temporal * (count - 1) + 1} frames: Cosmos' VAE knows the statistics of the first "
                f"{self.geometry.temporal * (most - 1) + 1} only"
            )
        mean, std = (
            torch.tensor(s, device=latents.device).view(1, vae.config.latent_channels, -1, 1, 1)[:, :, :count]
            for s in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean, std

    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """``text`` L D from T5, zero beyond the caption, at most 512 tokens."""
        length = min(512, encoders.pipeline.tokenizer.model_max_length)
        text, _ = encoders.pipeline.encode_prompt(
            prompt=list(captions), do_classifier_free_guidance=False, device=encoders.device, max_sequence_length=length
        )
        return {"text": text.cpu()}

    def blank_text(self) -> dict[str, Tensor]:
        return {"text": torch.zeros(self.text_length(512), self.denoiser_config["text_embed_dim"])}

    def file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        given = self.blueprint[self.component].config
        patch, head = given["patch_size"], int(given["attention_head_dim"])
        cells = patch[0] * patch[1] * patch[2]
        width, inputs = shapes["x_embedder.proj.1.weight"]
        block = "blocks.block0.blocks"
        return {
            "in_channels": inputs // cells - 1,  # the last one marks padding
            "out_channels": shapes["final_layer.linear.weight"][0] // cells,
            "num_attention_heads": width // head,
            "num_layers": layers(shapes, "blocks.block"),
            "mlp_ratio": shapes[f"{block}.2.block.layer1.weight"][0] / width,
            "text_embed_dim": shapes[f"{block}.1.block.attn.to_k.0.weight"][1],
            "adaln_lora_dim": shapes[f"{block}.0.adaLN_modulation.1.weight"][0],
            "max_size": [shapes[f"extra_pos_embedder.pos_emb_{axis}"][0] * p for axis, p in zip("thw", patch, strict=True)],
            # By size, as in NVIDIA's configs (cosmos-1-diffusion-text2world.py, rope_*_extrapolation_ratio).
            "rope_scale": {4096: [2.0, 1.0, 1.0], 5120: [2.0, 2.0, 2.0]}.get(width, given["rope_scale"]),
        }

    def class_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config["in_channels"] != config["out_channels"]:
            raise CheckpointError(
                f"takes {config['in_channels']} channels: a video2world model",
                where=self.blueprint[self.component].origin,
                expected=f"a text2world model, which takes {config['out_channels']}",
            )
        return {**config, "in_channels": config["in_channels"] + 1, "concat_padding_mask": False}

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        clean = batch["latents"].float()
        count, _, frames, height, width = clean.shape
        # ln sigma is normal where t is logit-normal, as Cosmos was trained: see edm.sigma_of.
        sigma = edm.sigma_of(self.times(clean, keys))
        e = noise(keys, clean.shape[1:])
        padding = torch.zeros(count, 1, frames, height, width)
        inputs = {
            "hidden_states": torch.cat([edm.scale_input(edm.mix(clean, e, sigma), sigma, DATA), padding], 1),
            "timestep": edm.condition(sigma),
            "encoder_hidden_states": batch["text"].float(),
            "fps": FPS,
        }
        return inputs, [(edm.target(clean, e, sigma, DATA), None)]
