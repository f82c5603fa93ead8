"""The registry of families: a name in a config to the class in one file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from diffpipe.errors import ConfigError

if TYPE_CHECKING:
    from diffpipe.config.schema import ModelConfig, ObjectiveConfig
    from diffpipe.models.base import DiffusionModel

MODELS: dict[str, str] = {
    "chroma": "diffpipe.models.chroma:Chroma",
    "cosmos": "diffpipe.models.cosmos:Cosmos",
    "flux": "diffpipe.models.flux:Flux",
    "flux-kontext": "diffpipe.models.flux_kontext:FluxKontext",
    "hunyuan-video": "diffpipe.models.hunyuan_video:HunyuanVideo",
    "ltx-video": "diffpipe.models.ltx_video:LTXVideo",
    "lumina2": "diffpipe.models.lumina2:Lumina2",
    "sdxl": "diffpipe.models.sdxl:SDXL",
    "wan": "diffpipe.models.wan:Wan",
    "wan-i2v": "diffpipe.models.wan_i2v:WanI2V",
}


def model_class(family: str) -> type[DiffusionModel]:
    """The class registered as ``family``.

    Raises:
        ConfigError: when no family has that name.
    """
    if family not in MODELS:
        raise ConfigError(
            f"there is no family {family!r}", where="model.family", expected=", ".join(sorted(MODELS)), fix="name one of these"
        )
    module, _, name = MODELS[family].partition(":")
    return getattr(import_module(module), name)


def make_model(config: ModelConfig, objective: ObjectiveConfig) -> DiffusionModel:
    """The family that a config names, ready to load encoders or weights."""
    return model_class(config.family)(config, objective)
