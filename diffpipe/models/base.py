"""What a model family is: where its module may be cut, what its latents look like, and what one training example is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffpipe.config.schema import ModelConfig, ObjectiveConfig

if TYPE_CHECKING:
    from diffpipe.flow import Key
    from diffpipe.models.weights import WeightSource

Targets = list[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class StageSpec:
    """Where a diffusers module may be cut.

    Attributes:
        units: module paths in the order ``forward`` calls them; ``blocks.*`` means every entry of a list.
        carry: modules used before the units whose outputs all stages need: run on the first, sent along.
        replicate: modules used before the units kept on every stage, where sending their output costs more.
        post: modules used only after the last unit.
        live: which units' outputs cross the border before unit ``b``; the default is the unit just before.
    """

    units: tuple[str, ...]
    carry: tuple[str, ...] = ()
    replicate: tuple[str, ...] = ()
    post: tuple[str, ...] = ()
    live: Callable[[int], tuple[int, ...]] = field(default=lambda border: (border - 1,))


@dataclass(frozen=True)
class Geometry:
    """The shape rules of a family's latents.

    Attributes:
        spatial: pixels per latent cell along height and width.
        temporal: frames per latent frame; valid counts are ``temporal * k + 1``. 1 for image families.
        patch: latent cells per token along height and width.
        fps: frame rate that videos are resampled to; None for image families, which take no video.
    """

    spatial: int
    temporal: int = 1
    patch: int = 2
    fps: float | None = None

    @property
    def multiple(self) -> int:
        """Pixels that a bucket's height and width must be a multiple of."""
        return self.spatial * self.patch

    def frames(self, wanted: int) -> int:
        """The largest valid frame count not above ``wanted``."""
        return (wanted - 1) // self.temporal * self.temporal + 1


class DiffusionModel(ABC):
    """One family. A subclass is one file; nothing in it knows of ranks, stages, caches or memory."""

    name: ClassVar[str]
    title: ClassVar[str]
    spec: ClassVar[StageSpec]
    geometry: ClassVar[Geometry]
    denoiser: ClassVar[str]  # name of the diffusers class of the trained module
    pipeline: ClassVar[str]  # name of the diffusers pipeline class, whose encode_prompt and LoRA loader are used

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig) -> None:
        self.config, self.objective = config, objective

    # -- act one: media and captions to tensors ------------------------------------------------------------------

    @abstractmethod
    def load_encoders(self, device: torch.device) -> Any:
        """The VAE and the text encoders on ``device``, in evaluation mode, frozen."""

    @abstractmethod
    def encode_media(self, encoders: Any, pixels: Tensor) -> dict[str, Tensor]:
        """Normalised latents of ``pixels`` (B C F H W in [-1, 1]; F is 1 for an image), first dim B."""

    @abstractmethod
    def encode_text(self, encoders: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of ``captions`` at the family's fixed text length, first dim len(captions)."""

    @abstractmethod
    def identity(self, part: str) -> str:
        """A string that changes whenever encoding ``part`` ("media" or "text") could give other tensors:
        the encoders' weights and configs by content, the dtype, and the version of the code here."""

    # -- act two: tensors to a loss -------------------------------------------------------------------------------

    @abstractmethod
    def denoiser_config(self) -> dict[str, Any]:
        """The config of the diffusers class: the folder's own, or that of the variant a single file holds."""

    @abstractmethod
    def load_denoiser(self) -> nn.Module:
        """The whole denoiser with parameters on the meta device and real non-persistent buffers (RoPE tables)."""

    @abstractmethod
    def weights(self) -> WeightSource:
        """Where the denoiser's tensors lie, under diffusers names, read one by one on demand."""

    @abstractmethod
    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        """One microbatch of cached tensors (stacked, first dim B, one key each) to the keyword inputs of the
        denoiser's ``forward`` and, per output, the target and an optional weight of the squared error.
        All on the CPU, all noise and timesteps from ``keys`` alone."""

    def lora_targets(self, module: nn.Module) -> list[str]:
        """Names of the layers an adapter goes on unless the config names others: every linear layer in a unit."""
        roots = tuple(unit.removesuffix("*") if unit.endswith(".*") else unit + "." for unit in self.spec.units)
        return [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.startswith(roots)]
