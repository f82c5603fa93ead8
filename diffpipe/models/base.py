"""What a model family is: where its module may be cut, what its latents look like, and what one training example is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpipe.config.schema import ModelConfig, ObjectiveConfig
from diffpipe.flow import Key
from diffpipe.models.encoders import Encoders, check_folder, diffusers_module, fingerprint, load_encoders
from diffpipe.models.weights import WeightSource, convert, open_folder, open_single

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
    original_mark: ClassVar[str]  # a tensor that only the original checkpoint format has
    encoding: ClassVar[int] = 1  # raised when the code of encode_media or encode_text changes what it gives

    def __init__(self, config: ModelConfig, objective: ObjectiveConfig) -> None:
        self.config, self.objective = config, objective

    # -- act one: media and captions to tensors ------------------------------------------------------------------

    def load_encoders(self, device: torch.device) -> Encoders:
        """The VAE and the text encoders on ``device``, in evaluation mode, frozen."""
        return load_encoders(self.folder, self.pipeline, getattr(torch, self.config.dtype), device)

    @abstractmethod
    def encode_media(self, encoders: Encoders, pixels: Tensor) -> dict[str, Tensor]:
        """Normalised latents of ``pixels`` (B C F H W in [-1, 1]; F is 1 for an image), first dim B."""

    @abstractmethod
    def encode_text(self, encoders: Encoders, captions: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of ``captions`` at the family's fixed text length, first dim len(captions)."""

    def identity(self, part: str) -> str:
        """What the tensors of ``part`` ("media" or "text") depend on besides the sample: the encoders' weights
        and configs by content, the type of computation, and ``encoding``, the version of the code here."""
        return f"{self.name}/{self.encoding}/{self.config.dtype}/{fingerprint(self.folder, part)}"

    # -- act two: tensors to a loss -------------------------------------------------------------------------------

    @abstractmethod
    def single_file_config(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The config values that the original names and shapes of a single file tell.

        Raises:
            CheckpointError: when the file is not this family's.
        """

    @cached_property
    def folder(self) -> Path:
        """The diffusers folder that ``model.path`` names.

        Raises:
            CheckpointError: when it is no diffusers folder of this family.
        """
        return check_folder(Path(self.config.path), self.denoiser)

    def denoiser_class(self) -> Any:
        return getattr(diffusers_module(), self.denoiser)

    @cached_property
    def folder_config(self) -> dict[str, Any]:
        return json.loads((self.folder / "transformer" / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """The config of the diffusers class: the folder's own, changed by what a single file holds."""
        config = dict(self.folder_config)
        if self.config.transformer is not None:
            tensors = open_single(self.config.transformer)
            if not self._diffusers_names(tensors):
                config |= self.single_file_config({name: tuple(t.shape) for name, t in tensors.items()})
        return config

    def load_denoiser(self) -> nn.Module:
        """The whole denoiser with parameters on the meta device and real non-persistent buffers (RoPE tables)."""
        from accelerate import init_empty_weights

        # Some classes draw their tables even on meta; the random state belongs to the training.
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            module = self.denoiser_class().from_config(self.denoiser_config)
        return module.requires_grad_(False).train()

    def weights(self) -> WeightSource:
        """Where the denoiser's tensors lie, under diffusers names, read one by one on demand."""
        if self.config.transformer is None:
            return open_folder(self.folder / "transformer")
        tensors = open_single(self.config.transformer)
        if self._diffusers_names(tensors):
            return WeightSource(tensors, self.config.transformer)
        return convert(tensors, self.denoiser, self.denoiser_config, self.config.transformer)

    def _diffusers_names(self, tensors: Mapping[str, Any]) -> bool:
        """Whether a single file already uses the names of the diffusers class."""
        first = self.spec.units[0].removesuffix("*")
        return any(n.startswith(first) for n in tensors) and self.original_mark not in tensors

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that the frozen weight ``name`` is kept in: ``model.dtype``, or float32 where the class insists."""
        insists = self.denoiser_class()._keep_in_fp32_modules or []
        return torch.float32 if any(part in insists for part in name.split(".")) else getattr(torch, self.config.dtype)

    @abstractmethod
    def prepare(self, batch: dict[str, Tensor], keys: Sequence[Key]) -> tuple[dict[str, Any], Targets]:
        """One microbatch of cached tensors (stacked, first dim B, one key each) to the keyword inputs of the
        denoiser's ``forward`` and, per output, the target and an optional weight of the squared error.
        All on the CPU, all noise and timesteps from ``keys`` alone."""

    def lora_targets(self, module: nn.Module) -> list[str]:
        """Names of the layers an adapter goes on unless the config names others: every linear layer in a unit."""
        roots = tuple(unit.removesuffix("*") if unit.endswith(".*") else unit + "." for unit in self.spec.units)
        return [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.startswith(roots)]


def layers(names: Iterable[str], prefix: str) -> int:
    """How many numbered entries ``names`` have under ``prefix``."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
