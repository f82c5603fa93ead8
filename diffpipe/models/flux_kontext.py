"""Flux.1 Kontext dev: Flux that sees another picture, and makes an edit of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffpipe.flow import Key
from diffpipe.models.base import Targets
from diffpipe.models.flux import Flux, pack, positions


class FluxKontext(Flux):
    """The control picture's latents go on behind the noisy ones, at positions of their own; what comes out there is no prediction."""

    name = "flux-kontext"
    title = "Flux.1 Kontext dev"
    pipeline = "FluxKontextPipeline"
    takes_controls = True
    takes_image = True
    unused = frozenset({"image_encoder", "feature_extractor"})

    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        inputs, [(target, _)] = super().prepare(batch, keys)
        shown = batch["control_latents"].float()
        beside = positions(shown.shape[-2] // 2, shown.shape[-1] // 2)
        beside[:, 0] = 1
        inputs["hidden_states"] = torch.cat([inputs["hidden_states"], pack(shown)], 1)
        inputs["img_ids"] = torch.cat([inputs["img_ids"], beside])
        tokens = target.shape[1]
        # The mean over all tokens is then that over the predicted ones.
        weight = beyond(torch.full((1, tokens, 1), (tokens + len(beside)) / tokens), len(beside))
        return inputs, [(beyond(target, len(beside)), weight)]

    def make_pipeline(self, components: dict[str, Any]) -> Any:
        made = super().make_pipeline(components)
        # By which it knows latents; it asks the VAE, which may be absent.
        made.latent_channels = self.blueprint["vae"].config["latent_channels"]
        return made

    def conditions(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, shown: Mapping[str, Tensor]) -> dict[str, Any]:
        height, width = (side * self.geometry.spatial for side in shown["latents"].shape[-2:])
        # By default it makes pictures of 1024 x 1024 pixels' area, whatever size it is asked for.
        return {**super().conditions(text, negative, shown), "image": shown["latents"], "max_area": height * width}

    def spread(self, mask: Tensor, target: Tensor) -> Tensor:
        own = super().spread(mask, target)
        return beyond(own, target.shape[1] - own.shape[1])


def beyond(tokens: Tensor, more: int) -> Tensor:
    """B N C, and ``more`` tokens of zeros."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, more))
