"""Wan2.1 image to video, 14B at 480p and 720p."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpipe.flow import Key
from diffpipe.models.base import Targets
from diffpipe.models.encoders import Encoders
from diffpipe.models.names import Originals, Shapes, linear
from diffpipe.models.wan import Wan, original_shapes


def image_shapes() -> Shapes:
    """Alibaba's names for Wan2.1 image to video: those of text to video and what takes in the first frame."""
    w, clip = 1536, 1280
    shapes = original_shapes() | {"patch_embedding.weight": (w, 36, 1, 2, 2)}
    shapes |= linear("img_emb.proj.1", clip, clip) | linear("img_emb.proj.3", w, clip)
    shapes |= {f"img_emb.proj.{n}.{part}": (rows,) for n, rows in ((0, clip), (4, w)) for part in ("weight", "bias")}
    attention = "blocks.0.cross_attn"
    shapes |= linear(f"{attention}.k_img", w, w) | linear(f"{attention}.v_img", w, w)
    return shapes | {f"{attention}.norm_k_img.weight": (w,)}


class WanI2V(Wan):
    """Besides the noisy latents the model sees the clip's first frame, as ``WanImageToVideoPipeline`` gives it: its latents
    followed by those of grey frames, a mask of the frames that are known, and tokens from CLIP. A picture conditions itself."""

    name = "wan-i2v"
    title = "Wan2.1 i2v 14B 480p, 720p"
    pipeline = "WanImageToVideoPipeline"
    originals = Originals(Wan.denoiser, image_shapes)
    takes_image = True

    def other_family(self, config: Mapping[str, Any]) -> str | None:
        return "wan" if config["in_channels"] == config["out_channels"] else None

    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """``latents`` and ``condition`` C f h w, the latter of the first frame and grey ones; ``image`` L D, CLIP's tokens of it."""
        first = pixels[:, :, :1]
        still = torch.cat([first, torch.zeros_like(pixels[:, :, 1:])], 2)
        pictures = ((first[:, :, 0] + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        tokens = encoders.pipeline.encode_image([picture.numpy() for picture in pictures], encoders.device)
        return {
            **super().encode_media(encoders, pixels),
            "condition": super().encode_media(encoders, still)["latents"],
            "image": tokens.to(getattr(torch, self.config.dtype)).cpu(),
        }

    def blank_media(self, frames: int, height: int, width: int) -> dict[str, Tensor]:
        media, clip = super().blank_media(frames, height, width), self.blueprint["image_encoder"].config
        tokens = (clip["image_size"] // clip["patch_size"]) ** 2 + 1
        return {**media, "condition": media["latents"], "image": torch.zeros(tokens, clip["hidden_size"])}

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        inputs, targets = super().prepare(batch, keys)
        return self.inputs_of(inputs, batch), targets

    def make_sampler(self, denoiser: nn.Module) -> Any:
        """That of text to video: the loop is the same, and the one of image to video would encode the picture itself."""
        from diffusers import WanPipeline

        absent = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
        components: dict[str, Any] = {**absent, "scheduler": self.load_scheduler(), "transformer": denoiser}
        made: Any = WanPipeline(**components)
        made.set_progress_bar_config(disable=True)
        return made

    def inputs_of(self, call: dict[str, Any], shown: Mapping[str, Tensor]) -> dict[str, Any]:
        """With the first frame beside the noisy latents."""
        condition = shown["condition"].float()
        # One channel for each frame of a latent frame. The first frame fills all of its own latent frame's.
        mask = torch.zeros_like(condition[:, :1]).repeat(1, self.geometry.temporal, 1, 1, 1)
        mask[:, :, 0] = 1
        beside = torch.cat([call["hidden_states"], mask, condition], 1)
        return {**call, "hidden_states": beside, "encoder_hidden_states_image": shown["image"].float()}
